"""Decoding one token at a time: what a tuning costs whoever generates with it."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import petune
from petune_bench.performance.contenders import base, peft_lora, shared_copy
from petune_bench.performance.serving import share

RANK = 8
PROMPT, TURNS, TOKENS = 16, 10, 24
THREADS = 2
METHODS = {
    "petune's LoRA": "lora",
    "petune's OFT": "oft",
    "petune's p-tuning": "p-tuning",
    "petune's prompt-tuning": "prompt-tuning",
    "petune's prefix-tuning": "prefix-tuning",
}
BASE, OURS, PEFT = "the base", "petune's LoRA", "PEFT's LoRA"


class Clock:
    """A streamer that notes when each token is there, the prompt's own put included."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, tokens: Tensor) -> None:
        """Called by `generate` with the prompt, then with every new token."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Called by `generate` when it is done."""

    def seconds(self) -> list[float]:
        """From each new token to the next: the first token, which the prompt's forward gives, only starts the count."""
        return [later - now for now, later in itertools.pairwise(self.moments[1:])]


def contenders() -> dict[str, Any]:
    """Models around the same frozen weights: the base, PEFT's LoRA, and one for each of petune's methods."""
    plain = base("fp32")
    models: dict[str, Any] = {BASE: shared_copy(plain)}
    for name, method in METHODS.items():
        model = shared_copy(plain)
        given: dict[str, Any] = {"rank": RANK} if method == "lora" else {}
        tuning = petune.attach(model, method, **given)
        models[name] = model
        if name == OURS:
            weights = {key: tensor.detach() for key, tensor in tuning.state()}
            models[PEFT] = peft_lora(shared_copy(plain), weights, rank=RANK)
    for model in models.values():
        model.eval()
    return models


def decode(model: Any, prompt: Tensor, tokens: int) -> list[float]:
    """The seconds of each token after the first, greedily and with a cache."""
    clock = Clock()
    settings = copy.deepcopy(model.generation_config)
    settings.update(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True
    )
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=settings,
        streamer=clock,
    )
    return clock.seconds()


def in_turns(
    models: Mapping[str, Any], turns: int = TURNS, tokens: int = TOKENS
) -> dict[str, list[list[float]]]:
    """The seconds of each model's tokens, turn by turn; every other turn goes through the models backwards."""
    drawn = torch.Generator().manual_seed(0)
    prompt = torch.randint(5, 500, (1, PROMPT), generator=drawn)
    for model in models.values():
        decode(model, prompt, 4)  # fills caches
    taken: dict[str, list[list[float]]] = {name: [] for name in models}
    order = list(models)
    for _ in range(turns):
        for name in order:
            taken[name].append(decode(models[name], prompt, tokens))
        order.reverse()
    return taken


def with_threads(count: int, function: Callable[[], Any]) -> Any:
    """What the function answers where torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


def measured() -> Iterator[list[str]]:
    """Rows of the table."""
    taken = with_threads(THREADS, lambda: in_turns(contenders()))
    return table(taken)


def table(taken: Mapping[str, list[list[float]]]) -> Iterator[list[str]]:
    """Rows of the table from the seconds of each token of each turn."""
    turns = {name: list(map(statistics.median, found)) for name, found in taken.items()}
    fastest = {name: quick(found) for name, found in taken.items()}
    for name, times in turns.items():
        of_peft = "–"
        if name in (OURS, PEFT):
            of_peft = f"{share(times, turns[PEFT]):.2f}"
        yield [
            name,
            f"{statistics.median(times):.4f}",
            f"{share(times, turns[BASE]):.2f}",
            of_peft,
            f"{fastest[name]:.4f}",
            f"{fastest[name] / fastest[BASE]:.2f}",
        ]


def quick(turns: list[list[float]]) -> float:
    """The seconds that one token in ten stays under: what remains when nothing else runs on the machine."""
    tokens = [seconds for turn in turns for seconds in turn]
    return statistics.quantiles(tokens, n=10)[0]
