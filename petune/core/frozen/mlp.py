"""What the linear layers of an MLP are for, read off their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

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

    @property
    def size(self) -> tuple[int, int]:
        """(width, out)."""
        return self.width, self.out

    @property
    def is_aside(self) -> bool:
        """Whether its name says that it is no part of the MLP."""
        return not ASIDE.isdisjoint(words_of(self.name))

    def opens(self, down: Layer, hidden: int) -> bool:
        """Whether `down` gives back the width that this layer takes, and takes what it gives, or half of that."""
        if self.is_aside or down.is_aside or self.width != down.out:
            return False
        into_the_stream = down.out == hidden and self.out >= down.width
        return into_the_stream or self.out in (down.width, 2 * down.width)


def mlp_roles(names: Sequence[str], sizes: Sequence[tuple[int, int]], hidden: int) -> list[str]:
    """The roles of the linear layers of an MLP: `down` is the last that gives back the width that another takes.

    Args:
        sizes: (in, out) of each layer.
        hidden: the width of the residual stream.
    """
    layers = [
        Layer(i, name, *size) for i, (name, size) in enumerate(zip(names, sizes, strict=True))
    ]
    pairs = [(up, down) for up, down in combinations(layers, 2) if up.opens(down, hidden)]
    roles = ["other"] * len(layers)
    if not pairs:
        return roles
    down = max((down for _, down in pairs), key=lambda layer: layer.index)
    shapes = {up.size for up, _ in pairs}
    ups = [layer for layer in layers if layer is not down and layer.size in shapes]
    gate = _gate(ups)
    for up in ups:
        fused = up.out == 2 * down.width
        roles[up.index] = "gate_up" if fused else "gate" if up is gate else "up"
    roles[down.index] = "down"
    return roles


def _gate(ups: Sequence[Layer]) -> Layer | None:
    """Of several layers that read the MLP's input the gate: the one whose name says so, else the first."""
    if len(ups) < 2:
        return None
    named = [up for up in ups if "gate" in up.name.rpartition(".")[2]]
    return named[0] if named else ups[0]
