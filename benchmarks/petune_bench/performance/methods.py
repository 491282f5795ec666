"""`python -m petune_bench.performance.methods`: what each method keeps for backward, beside PEFT's form of it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

import petune
from petune.errors import UnsupportedError
from petune.training.setup import quietly
from petune_bench.performance.contenders import Batch, plain_batch
from petune_bench.performance.loops import Loop, Work, minilm, ours, peft, smollm2

HEAD = """## Methods

One step of 2 × 128 tokens of SmolLM2 in bf16, the last 16 of each labelled, and of 32 × 32 of MiniLM in fp32 with a
classifier: KB a token kept for backward, with the share of PEFT's in brackets. Each method at its defaults, PEFT's form
of it at the same modules and sizes; petune's within `petune.lean`.
"""
COLUMNS = [
    "method",
    "SmolLM2, PEFT",
    "SmolLM2, petune",
    "MiniLM, PEFT",
    "MiniLM, petune",
]
FOOT = """
–: PEFT has no such method. Its prefix tuning runs no encoder.
"""
OPTIONS: dict[str, Mapping[str, Any]] = {"trainable-tokens": {"ids": [5, 6, 7, 8]}}
"""Arguments that a method can't do without."""

Make = Callable[[str, Work], Loop]


def classified_batch(size: int = 32, length: int = 32) -> Batch:
    """Rows of one length, without padding, each of one of two classes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1_000, 30_000, (size, length), generator=generator)
    labels = torch.randint(2, (size,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def kept_by_method() -> Iterator[list[str]]:
    """Rows of what every method of petune's own keeps: PEFT's and petune's on SmolLM2, then on MiniLM."""
    bases: list[tuple[Callable[[], Any], str, Batch]] = [
        (partial(smollm2, "bf16"), "CAUSAL_LM", plain_batch()),
        (partial(minilm, "fp32"), "SEQ_CLS", classified_batch()),
    ]
    for method in _own_methods():
        row = [method]
        for base, task, batch in bases:
            work = Work(base, task, method, OPTIONS.get(method, {}))
            row += _beside(_kept(peft, work, batch), _kept(_lean, work, batch))
        yield row


def _own_methods() -> list[str]:
    """The methods that are petune's own, and no wrapped ones of PEFT's."""
    return sorted(name for name in petune.methods() if ":" not in name)


def _lean(name: str, work: Work) -> Loop:
    return ours(name, work, {})


def _kept(make: Make, work: Work, batch: Batch) -> float | None:
    """KB a token that a step keeps, None where there is no such method for this model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loop = make(work.method, work)
            _, kept = loop.memory(batch)
        except UnsupportedError:
            return None
        except ValueError as refused:
            if "past key values" not in str(refused):
                raise
            return None
    loop.close()
    del loop
    gc.collect()
    return kept / batch["input_ids"].numel() / 1000


def _beside(theirs: float | None, mine: float | None) -> list[str]:
    if mine is None:
        return ["–", "–"]
    if theirs is None:
        return ["–", f"{mine:,.0f}"]
    return [f"{theirs:,.0f}", f"{mine:,.0f} ({mine / theirs:.2f})"]


def section() -> Iterator[str]:
    """The page's section on methods, line by line."""
    yield HEAD
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{' --- |' * len(COLUMNS)}"
    for row in kept_by_method():
        yield f"| {' | '.join(row)} |"
    yield FOOT


if __name__ == "__main__":
    with quietly():
        for line in section():
            print(line, flush=True)
