"""What is measured, as rows of tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from petune.training.tasks import Example, Task
from petune_bench.performance.contenders import (
    Batch,
    Contender,
    batches,
    contend,
    plain_batch,
    rows,
)
from petune_bench.performance.race import WARM_UP, Times, apart, race, ratios

EAGER: dict[str, Any] = {}
COMPILED: dict[str, Any] = {"compile": "regions"}
WAYS: dict[str, dict[str, Any] | None] = {
    "PEFT": None,
    "petune": EAGER,
    "petune, compiled": COMPILED,
}
OURS = [name for name in WAYS if name != "PEFT"]
SETTINGS: dict[str, dict[str, Any]] = {
    "recompute: false": {"recompute": False},
    "labelled_logits: false": {"labelled_logits": False},
    "gradient_checkpointing: 2": {"gradient_checkpointing": 2},
    "gradient_checkpointing: true": {"gradient_checkpointing": True},
    "packing: false": {"packing": False},
    "optimizer: adamw_8bit": {"optimizer": "adamw_8bit"},
    "compile: regions": COMPILED,
    "compile: regions, packing: false": COMPILED | {"packing": False},
    "compile: regions, memory_budget: 0.5": COMPILED | {"memory_budget": 0.5},
}
"""Each alone, beside a recipe that sets none of them."""
KEPT = [
    ("bf16", 0.0),
    ("bf16", 0.05),
    ("nf4 in bf16", 0.0),
    ("nf4 in fp32", 0.0),
    ("fp32", 0.0),
]
"""(precision, dropout) of which the bytes are counted."""


def main_race(
    steps: int,
) -> tuple[dict[str, Times], dict[str, tuple[int, int]], int, int]:
    """(times, (peak, kept) of the last batch, tokens a step, labelled tokens a step) of 8 questions and answers."""
    task, examples = rows("nq-sample", 8 * steps, 256)
    ways = [contend(name, task, settings) for name, settings in WAYS.items()]
    given = list(batches(task, examples))
    times = race(ways, given)
    memory = {way.name: way.memory(given[-1]) for way in ways}
    _close(ways)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in given)
    labelled = sum(int((batch["labels"] != -100).sum()) for batch in given)
    return times, memory, tokens // steps, labelled // steps


def other_precisions(steps: int) -> Iterator[list[str]]:
    """Rows of times at nf4 and with dropout, as shares of PEFT's."""
    task, examples = rows("nq-sample", 8 * (steps + WARM_UP), 256)
    for what, precision, dropout in (
        ("nf4", "nf4", 0.0),
        ("dropout 0.05", "fp32", 0.05),
    ):
        ways = [
            contend(name, task, settings, precision, dropout)
            for name, settings in WAYS.items()
        ]
        times = race(ways, batches(task, examples))
        _close(ways)
        peer = times["PEFT"]
        shares = [f"{ratios(times[name], peer):.2f}" for name in OURS]
        # dropout draws other masks in each
        same = (
            "–" if dropout else f"{max(apart(times[name], peer) for name in OURS):.0e}"
        )
        yield [what, f"{peer.median:.2f} s", *shares, same]


def kept(task: Task) -> Iterator[list[str]]:
    """Rows of what a step of 2 × 128 tokens, 16 of each labelled, keeps for backward and takes at most."""
    batch = plain_batch()
    tokens = batch["input_ids"].numel()
    for precision, dropout in KEPT:
        found: dict[str, tuple[int, int]] = {}
        for name, settings in WAYS.items():
            way = contend(name, task, settings, precision, dropout)
            way.step(batch)
            found[name] = way.memory(batch)
            way.close()
        what = f"{precision}, dropout {dropout}" if dropout else precision
        peaks = {name: peak / 1e6 for name, (peak, _) in found.items()}
        per_token = {name: kept / tokens / 1000 for name, (_, kept) in found.items()}
        yield [what, *_beside_peft(per_token), *_beside_peft(peaks)]


def _beside_peft(figures: Mapping[str, float]) -> list[str]:
    """PEFT's figure, then those of petune with their shares of it."""
    peer = figures["PEFT"]
    shares = [f"{figures[name]:,.0f} ({figures[name] / peer:.2f})" for name in OURS]
    return [f"{peer:,.0f}", *shares]


def settings(steps: int) -> Iterator[list[str]]:
    """Rows of what each setting changes, beside the defaults, on rows of 60 to 192 tokens."""
    task, short = rows("nq-sample", 2 * (steps + WARM_UP), 192)
    _, long = rows("xsum-sample", 2 * (steps + WARM_UP), 192)
    mixed: list[Example] = list(chain(*zip(short, long, strict=True)))
    for name, values in SETTINGS.items():
        ways = [contend("defaults", task, EAGER), contend(name, task, values)]
        given: list[Batch] = list(batches(task, mixed, 4))
        times = race(ways, given)
        plain, changed = (way.memory(given[-1]) for way in ways)
        _close(ways)
        difference = apart(times[name], times["defaults"])
        yield [f"`{name}`", f"{ratios(times[name], times['defaults']):.2f}", f"{changed[0] / plain[0]:.2f}",
               f"{changed[1] / plain[1]:.2f}", f"{difference:.0e}"]  # fmt: skip


def shares_of_sgemm(
    times: Mapping[str, Times], tokens: int, labelled: int, rate: float
) -> tuple[float, list[str]]:
    """The seconds that the frozen base takes at this rate, and which share of a step that is for each."""
    from petune_bench.performance.contenders import base

    model = base("fp32")
    head = model.get_output_embeddings().weight.numel()
    blocks = sum(p.numel() for p in model.parameters() if p.dim() == 2) - head
    # two operations in the forward, and two for the gradient of the activations
    floor = 4 * (blocks * tokens + head * labelled) / rate
    return floor, [f"{floor / found.median:.2f}" for found in times.values()]


def _close(ways: list[Contender]) -> None:
    for way in ways:
        way.close()
