"""The places of a model where a method may act."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from petune.core.frozen.tables import input_table, row_gain
from petune.core.frozen.weights import bias_of, stacked, stored

ALL_LINEAR = "q k v o gate up down"
"""Every linear layer inside the blocks, however the model fuses them."""
KINDS = {
    "linear": "q k v o qkv kv gate up gate_up down other head",
    "block": "layer attn cross-attn mlp norm qk-norm embed-norm final",
    "attention": "attention cross-attention",
    "embedding": "embed",
    "prompt": "prompt",
    "module": "classifier parameters",
}
"""The roles of each kind of site; those of kind "experts" have the roles of linear layers."""
KIND_OF = {role: kind for kind, roles in KINDS.items() for role in roles.split()}
Part = slice | Tensor
"""Some of the outputs of a fused projection: a run, or indices where heads interleave."""
FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "gate_up": ("gate", "up")}
"""The roles that a fused projection plays at once."""


@dataclass(frozen=True, eq=False)
class Site:
    """One place in the base model.

    Attributes:
        name: the name of its module in the model, with `#role` behind it where the module is a site of several kinds,
            and `[role]` where the site is a part of a fused projection; of stacked experts, their parameter's name.
        layer: the number of its block within its stack, from 0; None outside the blocks.
        in_features, out_features: the widths of what goes in and comes out.
        heads, kv_heads, head_dim, value_dim: of an attention: the heads of q, those of k and v, and their widths.
        entry: where the input of a block is seen, if `module` is only the last of the several that compute it.
        parts: the outputs of a fused projection by role, where they are known: a run, or indices where heads
            interleave.
        part: the outputs that this site covers, if it is a part of a fused projection.
        tied: the module's table is another module's too: a head's that is the input embedding's, and the other way
            round.
        parameter: of stacked experts, the module's parameter that holds a projection of all of them.
        experts: how many there are, 0 at any other site; the widths are those of one.
        peers: all sites of the tuning, this one included.
        methods: what takes the place of the module's own methods while an attention adapter is there, by name.
    """

    name: str
    kind: str
    role: str
    layer: int | None
    in_features: int
    out_features: int
    module: nn.Module = field(repr=False)
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    entry: nn.Module | None = field(default=None, repr=False)
    parts: dict[str, Part] = field(default_factory=dict, repr=False)
    part: Part | None = None
    tied: bool = False
    parameter: str = ""
    experts: int = 0
    peers: list[Site] = field(default_factory=list, repr=False)
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict, repr=False)
    pool: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def module_name(self) -> str:
        """The name of its module in the model."""
        name = self.whole_name.partition("#")[0]
        return name.removesuffix(f".{self.parameter}")

    @property
    def whole_name(self) -> str:
        """The name of the fused projection that it is a part of, else its own."""
        return self.name.partition("[")[0]

    def weight(self) -> Tensor:
        """The dense weight, float32: (out_features, in_features) of a linear layer, read by probing where it is not
        stored as such, so that it is right for every quantizer; (vocabulary, hidden) of an embedding or a prompt;
        (experts, out_features, in_features) of stacked experts.
        """
        if self.kind in ("embedding", "prompt"):
            table: Any = (
                input_table(self.module) if self.kind == "prompt" else self.module
            )
            return table.weight.detach().float()
        if self.kind == "experts":
            weight, _ = stacked(self.module, self.parameter)
        else:
            weight, _ = stored(self.module)
        return weight if self.part is None else weight[..., self.part, :]

    def bias(self) -> Tensor:
        """The bias of a linear layer, float32, (out_features,); zeros where it has none; (experts, out_features) of
        stacked experts.
        """
        if self.kind == "experts":
            _, bias = stacked(self.module, self.parameter)
        else:
            bias = bias_of(self.module)
        return bias if self.part is None else bias[..., self.part]

    def gain(self) -> float:
        """What an embedding multiplies the rows of its table by (Gemma: the root of the width)."""
        return row_gain(self.module)

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """One object for all sites of a tuning: made by the first that asks for `key`."""
        if key not in self.pool:
            self.pool[key] = make()
        return self.pool[key]


def with_role(sites: Iterable[Site], role: str) -> Site | None:
    """The first of the sites that plays a role, None if none does."""
    return next((site for site in sites if site.role == role), None)
