"""What the linear layers of an MLP are for, read off their sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, compress, count, filterfalse, pairwise
from operator import itemgetter

from petune.core.frozen.roles import words_of

ASIDE = {"bottleneck", "router"}
"""Words of layers that stand beside an MLP's own."""


@dataclass(frozen=True, order=True)
class Layer:
    """A linear layer among those of an MLP, which maps `width` features to `out`."""

    index: int
    name: str
    width: int
    out: int

    @classmethod
    def of(cls, index: int, name: str, size: tuple[int, int]) -> Layer:
        """A layer of a size, (in, out)."""
        return cls(index, name, *size)

    def size(self) -> tuple[int, int]:
        """(in, out)."""
        return self.width, self.out

    def is_aside(self) -> bool:
        """Whether its name says that it is no part of the MLP."""
        return not ASIDE.isdisjoint(words_of(self.name))

    def says_gate(self) -> bool:
        """Whether its name says that it is the gate."""
        return "gate" in self.name.rpartition(".")[2]


def mlp_roles(
    names: Sequence[str], sizes: Sequence[tuple[int, int]], hidden: int
) -> list[str]:
    """The roles of the linear layers of an MLP: `down` is the last that gives back the
    width that another takes.

    Args:
        sizes: (in, out) of each layer.
        hidden: the width of the residual stream.
    """
    layers = list(map(Layer.of, count(), names, sizes))
    roles = ["other"] * len(layers)
    own = list(filterfalse(Layer.is_aside, layers))
    if not own:
        return roles
    for one in _one_by_one(own, hidden):
        _fill(roles, one, hidden)
    return roles


def _one_by_one(layers: Sequence[Layer], hidden: int) -> Iterator[Sequence[Layer]]:
    """The layers of each MLP, where several stand one after the other: each ends with a layer of one size that gives
    back the stream.
    """
    closing = map(itemgetter(1), _pairs(layers, hidden))
    into_stream = filter(lambda layer: layer.out == hidden != layer.width, closing)
    sizes = set(map(Layer.size, into_stream))
    is_end = [layer.size() in sizes for layer in layers]
    ends = list(compress(count(1), is_end))
    if len(sizes) != 1 or not is_end[-1]:
        ends = [len(layers)]
    for start, end in pairwise([0, *ends]):
        yield layers[start:end]


def _pairs(layers: Sequence[Layer], hidden: int) -> list[tuple[Layer, Layer]]:
    """Two layers each, of which the second gives back what the first takes."""
    every = combinations(layers, 2)
    return list(filter(lambda pair: _match(pair[0], pair[1], hidden), every))


def _fill(roles: list[str], layers: Sequence[Layer], hidden: int) -> None:
    """Note the roles of the layers of one MLP."""
    pairs = _pairs(layers, hidden)
    if not pairs:
        return
    opening, closing = zip(*pairs, strict=True)
    down = max(closing)
    shapes = set(map(Layer.size, opening))
    ups = list(filter(lambda layer: layer.size() in shapes, layers))
    if down in ups:
        ups.remove(down)
    for up in ups:
        roles[up.index] = _role_of_up(up, down, ups)
    roles[down.index] = "down"


def _role_of_up(up: Layer, down: Layer, ups: Sequence[Layer]) -> str:
    """The role of a layer that reads the MLP's input, among all that do."""
    if up.out == 2 * down.width:
        return "gate_up"
    gate = next(filter(Layer.says_gate, ups), ups[0])
    return "gate" if up is gate and len(ups) > 1 else "up"


def _match(up: Layer, down: Layer, hidden: int) -> bool:
    """Whether `down` gives back the width that `up` takes, and takes what it gives, or
    half of that.
    """
    if up.width != down.out:
        return False
    widths = [down.width, 2 * down.width]
    if down.out == hidden:  # into the stream, whatever is between
        widths.append(max(up.out, down.width))
    return up.out in widths
