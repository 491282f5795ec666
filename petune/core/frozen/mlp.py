"""What the linear layers of an MLP are for, read off their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, count

from petune.core.frozen.roles import words_of

ASIDE = {"bottleneck", "router"}
"""Words of layers that stand beside an MLP's own."""


@dataclass(frozen=True)
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

    @property
    def size(self) -> tuple[int, int]:
        """(in, out)."""
        return self.width, self.out

    @property
    def is_aside(self) -> bool:
        """Whether its name says that it is no part of the MLP."""
        return not ASIDE.isdisjoint(words_of(self.name))

    @property
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
    own = [layer for layer in layers if not layer.is_aside]
    pairs = [pair for pair in combinations(own, 2) if _match(*pair, hidden)]
    roles = ["other"] * len(layers)
    if not pairs:
        return roles
    down = max((down for _, down in pairs), key=lambda layer: layer.index)
    shapes = {up.size for up, _ in pairs}
    ups = [layer for layer in layers if layer is not down and layer.size in shapes]
    roles[down.index] = "down"
    for up in ups:
        roles[up.index] = "gate_up" if up.out == 2 * down.width else "up"
    gate = _gate(ups)
    if roles[gate.index] == "up" and len(ups) > 1:
        roles[gate.index] = "gate"
    return roles


def _match(up: Layer, down: Layer, hidden: int) -> bool:
    """Whether `down` gives back the width that `up` takes, and takes what it gives, or
    half of that.
    """
    if up.width != down.out:
        return False
    into_the_stream = down.out == hidden and up.out >= down.width
    return into_the_stream or up.out in (down.width, 2 * down.width)


def _gate(ups: Sequence[Layer]) -> Layer:
    """Of the layers that read the MLP's input the one whose name says so, else the first."""
    return next(filter(lambda up: up.says_gate, ups), ups[0])
