"""Attaching, switching and routing: what a user who has several tunings pays."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import cycle
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import petune
from petune_bench.performance.contenders import RANK, base, plain_batch

LAYERS = 32  # of 7 linear layers each: 224
TUNINGS = 8


def in_turns(
    functions: Mapping[str, Callable[[], float | None]], times: int
) -> dict[str, list[float]]:
    """The seconds of each, turn by turn; one that answers a number has taken its own time."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(times + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            own = function()
            taken[name].append(time.perf_counter() - began if own is None else own)
    # the first turn fills caches
    return {name: found[1:] for name, found in taken.items()}


def share(times: list[float], other: list[float]) -> float:
    """The median over the turns of one time as a share of the other."""
    return statistics.median(
        mine / theirs for mine, theirs in zip(times, other, strict=True)
    )


def attach_and_switch() -> dict[str, list[float]]:
    """Seconds on a small Llama of 224 linear layers."""
    model = _llama()
    return _attach(model) | _switch(model)


def _llama() -> Any:
    config = LlamaConfig(
        vocab_size=512,
        num_hidden_layers=LAYERS,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def _peft_config() -> Any:
    import peft

    return peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def _attach(model: Any) -> dict[str, list[float]]:
    import peft

    config = _peft_config()

    def ours() -> float:
        began = time.perf_counter()
        tuning = petune.attach(model, "lora", rank=RANK)
        taken = time.perf_counter() - began
        tuning.detach()
        return taken

    def theirs() -> float:
        own = copy.deepcopy(model)
        began = time.perf_counter()
        peft.get_peft_model(own, config)
        return time.perf_counter() - began

    return in_turns({"attach": ours, "attach, PEFT": theirs}, 7)


def _switch(model: Any) -> dict[str, list[float]]:
    """From one LoRA to another and back."""
    import peft

    config = _peft_config()
    peer: Any = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="one")
    peer.add_adapter("two", config)
    one, two = (petune.attach(model, "lora", name=n, rank=RANK) for n in ("one", "two"))
    two.disable()
    names = cycle(["two", "one"])

    def ours() -> None:
        one.enabled, two.enabled = two.enabled, one.enabled

    def theirs() -> None:
        peer.set_adapter(next(names))

    return in_turns({"switch": ours, "switch, PEFT": theirs}, 9)


@torch.no_grad()
def route(rows: int = 8, length: int = 128) -> dict[str, list[float]]:
    """Seconds of a forward with one LoRA for all rows, and with another one for each."""
    import peft

    names = [f"t{i}" for i in range(TUNINGS)]
    ours: Any = copy.deepcopy(base("fp32")).eval()
    theirs: Any = copy.deepcopy(base("fp32")).eval()
    config = _peft_config()
    theirs = peft.get_peft_model(theirs, config, adapter_name=names[0])
    for name in names:
        petune.attach(ours, "lora", name=name, rank=RANK).enabled = name == names[0]
        if name != names[0]:
            theirs.add_adapter(name, config)
    theirs.eval()
    batch: Any = {k: v for k, v in plain_batch(rows, length).items() if k != "labels"}
    batch |= {"use_cache": False, "logits_to_keep": 1}

    def run(model: Any, context: Any = None, **more: Any) -> None:
        with context or nullcontext():
            model(**batch, **more)

    return in_turns(
        {
            "one": lambda: run(ours),
            "routed": lambda: run(ours, petune.route(ours, names)),
            "one, PEFT": lambda: run(theirs),
            "routed, PEFT": lambda: run(theirs, adapter_names=names),
        },
        15,
    )
