"""How PEFT names what a method has: the renaming as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Layout = Literal[
    "column", "row or column", "skew", "gain", "shift", "bias", "ranks", "ranks last"
]


@dataclass(frozen=True)
class PeftTwin:
    """How PEFT names what a method has.

    Args:
        kind: `peft_type`; "" for what PEFT only has as an option of other methods.
        arguments: PEFT's key of the configuration -> ours.
        tensors: our tensor (of `Adapter.plain`) -> PEFT's, after the module's name. Without any the method saves in
            PEFT's format and is not loaded from it; None: they have PEFT's names, with `/` before those of tensors that
            belong to the model as a whole.
        neutral: PEFT's options that must be missing or have one of these values, the first of which is written where
            no argument of ours says which: another value makes another method of it.
        same: our arguments that sites may have to change, as an attribute, and that PEFT has one of for all.
        roles: PEFT's key of the configuration, which lists modules -> our argument, which lists their roles.
        ranked: our tensor that has a row for each rank. Where given, sites may differ in rank and in `scale`, by
            arguments that end in `_pattern`; PEFT keeps r and lora_alpha with exceptions by module.
        layouts: our tensor -> how PEFT lays it out, where that differs; see `petune.formats.layouts`.
        drawn: our buffer, drawn from a seed -> PEFT's single one for all modules, of which each has the first rows and
            columns; PEFT may have saved it.
        whole: PEFT keeps the tensors of all sites in one, as a prompt's rows or as a prefix's keys and values.
        also: other kinds of PEFT's whose folders hold the same.
        unsaid: our arguments that only matter to training, and have no place in PEFT's configuration.
        cut: our tensor -> its dimension of ranks. PEFT leaves out those that training has cut; they are zeros here.
        embedding: like `tensors`, where the site is an embedding.
        beside: PEFT's option of other methods by which they do this besides their own: the biases, some tokens. Such
            a folder is a tuning of several methods here. Those that have the option list it in `neutral`.
        reasons: PEFT's option -> why a folder with another value than those in `neutral` is refused, and what to do.
        stacked: PEFT's option that lists parameters of stacked experts on which the method acts too; "" without one.
        blocks: our tensor of square blocks -> PEFT's option for their number, which may stand in place of that for
            their size, our `block`. Both, and our `factors`, are read off the tensor's shape.
        tables: our argument with which a head has rows of its own, where PEFT may hold some beside the embedding's.
        defaults: PEFT's option -> what it stands for in a folder that leaves it out, where that is not our default.
        starts: a value of PEFT's `init_lora_weights` -> of our `init`, where PEFT takes the start out of the base's
            weights again when it loads: our tensors `A0` and `B0`.
        cautions: PEFT's option -> a value and what is said where it is written, since PEFT does not read it everywhere.
        training: PEFT's options that it insists on and that only matter to training: written so, and not read.
    """

    kind: str
    arguments: Mapping[str, str]
    tensors: Mapping[str, str] | None
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    same: tuple[str, ...] = ()
    roles: Mapping[str, str] = field(default_factory=dict)
    ranked: str = ""
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    drawn: Mapping[str, str] = field(default_factory=dict)
    whole: Literal["", "prompt", "prefix"] = ""
    also: tuple[str, ...] = ()
    unsaid: tuple[str, ...] = ()
    cut: Mapping[str, int] = field(default_factory=dict)
    embedding: Mapping[str, str] = field(default_factory=dict)
    beside: str = ""
    reasons: Mapping[str, str] = field(default_factory=dict)
    stacked: str = ""
    tables: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    starts: Mapping[str, str] = field(default_factory=dict)
    cautions: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    blocks: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def name_of(self, tensor: str, kind: str) -> str:
        """PEFT's name of a tensor of ours at a site of some kind."""
        names = (
            self.embedding if kind == "embedding" and self.embedding else self.tensors
        )
        return tensor if names is None else names[tensor]
