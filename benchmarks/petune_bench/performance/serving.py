"""Attaching, switching and routing: what a user who has several tunings pays."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
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
    return {
        name: found[1:] for name, found in taken.items()
    }  # the first turn fills caches


def share(times: list[float], other: list[float]) -> float:
    """The median over the turns of one time as a share of the other."""
    return statistics.median(
        mine / theirs for mine, theirs in zip(times, other, strict=True)
    )


def _small_llama() -> Any:
    """A Llama of many narrow layers."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(vocab_size=512, num_hidden_layers=LAYERS, **sizes)
    return LlamaForCausalLM(config)


def attach_and_switch() -> dict[str, list[float]]:
    """Seconds on a small Llama of 224 linear layers."""
    import peft

    model = _small_llama()
    config = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")

    def attach() -> float:
        began = time.perf_counter()
        tuning = petune.attach(model, "lora", rank=RANK)
        taken = time.perf_counter() - began
        tuning.detach()
        return taken

    def attach_peft() -> float:
        own = copy.deepcopy(model)
        began = time.perf_counter()
        peft.get_peft_model(own, config)
        return time.perf_counter() - began

    found = in_turns({"attach": attach, "attach, PEFT": attach_peft}, 7)
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="one")
    theirs.add_adapter("two", config)
    one, two = (
        petune.attach(model, "lora", name=name, rank=RANK) for name in ("one", "two")
    )
    names = iter(["two", "one"] * 50)

    def switch() -> None:
        one.enabled, two.enabled = two.enabled, one.enabled

    two.disable()
    return found | in_turns(
        {"switch": switch, "switch, PEFT": lambda: theirs.set_adapter(next(names))}, 9
    )


@torch.no_grad()
def route(rows: int = 8, length: int = 128) -> dict[str, list[float]]:
    """Seconds of a forward with one LoRA for all rows, and with another one for each."""
    import peft

    names = [f"t{i}" for i in range(TUNINGS)]
    ours: Any = copy.deepcopy(base("fp32")).eval()
    theirs: Any = copy.deepcopy(base("fp32")).eval()
    config = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
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
