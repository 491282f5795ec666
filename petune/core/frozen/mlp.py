"""What the linear layers of an MLP are for, read off their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, count, filterfalse

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
    own = filterfalse(Layer.is_aside, layers)
    pairs = [pair for pair in combinations(own, 2) if _match(*pair, hidden)]
    if not pairs:
        return roles
    opening, closing = zip(*pairs, strict=True)
    down = max(closing)
    shapes = set(map(Layer.size, opening))
    ups = [layer for layer in layers if layer.size() in shapes]
    if down in ups:
        ups.remove(down)
    for up in ups:
        roles[up.index] = _role_of_up(up, down, ups)
    roles[down.index] = "down"
    return roles


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
