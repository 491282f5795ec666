"""The places of a model where a method may act, and how a user or a method picks among them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from petune.core.frozen.modules import input_table

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
"""The roles of each kind of site."""


KIND_OF = {role: kind for kind, roles in KINDS.items() for role in roles.split()}


FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "gate_up": ("gate", "up")}


@dataclass(frozen=True, eq=False)
class Site:
    """One place in the base model.

    `in_features` and `out_features` are the widths of what goes in and comes out; for attention sites `heads`,
    `kv_heads` and `head_dim` describe q and k, and `value_dim` the width of v. `layer` counts within its stack, from 0.
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
    """Where the input of a block is seen, if `module` is only the last of the several that compute it."""
    parts: dict[str, slice | Tensor] = field(default_factory=dict, repr=False)
    """The outputs of a fused projection by role, where they are known: a run, or indices where heads interleave."""
    part: slice | Tensor | None = None
    """The outputs that this site covers, if it is a part of a fused projection."""
    peers: list[Site] = field(default_factory=list, repr=False)
    """All sites of the tuning, this one included."""
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict, repr=False)
    """What takes the place of the module's own methods while an attention adapter is there, by name."""
    _pool: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def module_name(self) -> str:
        return self.name.partition("#")[0].partition("[")[0]

    def weight(self) -> Tensor:
        """The dense weight, float32: (out_features, in_features) of a linear layer, read by probing where it is not
        stored as such, so that it is right for every quantizer; (vocabulary, hidden) of an embedding or a prompt.
        """
        from petune.core.frozen.weights import stored

        if self.kind in ("embedding", "prompt"):
            table: Any = input_table(self.module) if self.kind == "prompt" else self.module
            return table.weight.detach().float()
        weight, _ = stored(self.module)
        return weight if self.part is None else weight[self.part]

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """One object for all sites of a tuning: made by the first that asks for `key`."""
        if key not in self._pool:
            self._pool[key] = make()
        return self._pool[key]
