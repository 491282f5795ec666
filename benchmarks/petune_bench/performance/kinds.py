"""Other kinds of models, other people's loops and long rows, each beside PEFT in transformers' Trainer."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial

from petune_bench.performance.contenders import Batch, plain_batch, rows
from petune_bench.performance.contenders import batches as padded
from petune_bench.performance.loops import (
    Loop,
    Work,
    minilm,
    ours,
    peft,
    sentences,
    smollm2,
    t5,
    translations,
)
from petune_bench.performance.race import Times, race, ratios

STEPS = 12
LENGTHS = (128, 512, 2048, 8192)

SENTENCES = Work(minilm, "SEQ_CLS", fresh=("classifier",))
TRANSLATIONS = Work(t5, "SEQ_2_SEQ_LM", options={"rank": 16})
QUESTIONS = Work(smollm2, "CAUSAL_LM", options={"rank": 16})
QUESTIONS_BF16 = Work(partial(smollm2, "bf16"), "CAUSAL_LM", options={"rank": 16})


def encoder() -> Iterator[list[str]]:
    """Rows of MiniLM that learns to tell sentences apart, as the quickstart has it."""
    yield from _beside_peft(SENTENCES, list(sentences(STEPS)))


def seq2seq() -> Iterator[list[str]]:
    """Rows of a T5 that learns to translate."""
    yield from _beside_peft(TRANSLATIONS, list(translations(STEPS)))


def _beside_peft(work: Work, given: list[Batch]) -> Iterator[list[str]]:
    ways = [
        peft("PEFT", work),
        ours("petune", work, {}),
        ours("petune, compiled", work, {"compile": "regions"}),
    ]
    times = race(ways, given)
    peer = ways[0].memory(given[-1])
    for way in ways:
        peak, kept = way.memory(given[-1])
        found = times[way.name]
        yield [
            way.name,
            _step(found),
            f"{ratios(found, times['PEFT']):.2f}",
            f"{found.warm_up:.0f}",
            f"{peak / peer[0]:.2f}",
            f"{kept / peer[1]:.2f}",
        ]
        way.close()


def _step(found: Times) -> str:
    return f"{found.median:.2f} ± {found.median * found.spread:.2f}"


def loops() -> Iterator[list[str]]:
    """Rows of a plain loop and of transformers' Trainer, each with and without `petune.lean`."""
    task, examples = rows("nq-sample", 8 * STEPS, 256)
    given = list(padded(task, examples))
    made: dict[str, Callable[[Work], Loop]] = {
        "PEFT, Trainer": lambda work: peft("PEFT, Trainer", work),
        "a plain loop": lambda work: ours("a plain loop", work, None),
        "a plain loop, lean": lambda work: ours("a plain loop, lean", work, {}),
        "Trainer, lean": lambda work: ours("Trainer, lean", work, {}, trainer=True),
    }
    ways = [make(QUESTIONS) for make in made.values()]
    times = race(ways, given)
    peaks = {way.name: way.memory(given[-1])[0] for way in ways}
    for way in ways:
        way.close()
    kept = {}
    for name, make in made.items():
        way = make(QUESTIONS_BF16)
        way.step(plain_batch())
        kept[name] = way.memory(plain_batch())[1]
        way.close()
    for name in made:
        found = times[name]
        yield [
            name,
            _step(found),
            *(
                f"{share:.2f}"
                for share in (
                    ratios(found, times["PEFT, Trainer"]),
                    kept[name] / kept["PEFT, Trainer"],
                    peaks[name] / peaks["PEFT, Trainer"],
                )
            ),
        ]


def long() -> Iterator[list[str]]:
    """Rows of one row of SmolLM2 at several lengths: megabytes at the peak above the base."""
    made: dict[str, Callable[[], Loop]] = {
        "PEFT": lambda: peft("PEFT", QUESTIONS),
        "petune": lambda: ours("petune", QUESTIONS, {}),
        "petune, `tile: 512`": lambda: ours("tile", QUESTIONS, {"tile": 512}),
        "PEFT, checkpointing": lambda: peft("PEFT", QUESTIONS, checkpointing=True),
        "petune, checkpointing, `tile: 512`": lambda: ours(
            "ours", QUESTIONS, {"tile": 512, "recompute": False}, checkpointing=True
        ),
    }
    peers: dict[int, int] = {}
    for name, make in made.items():
        shown = []
        for length in LENGTHS:
            way = make()
            peak, kept = way.memory(plain_batch(1, length, length // 2))
            way.close()
            del way
            gc.collect()
            if name.startswith("PEFT"):
                peers[length] = peak
            share = "" if name.startswith("PEFT") else f" ({peak / peers[length]:.2f})"
            shown.append(f"{peak / 1e6:,.0f}{share}, {kept / 1e6:,.0f}")
        yield [name, *shown]


def heads_of_long() -> list[str]:
    """The columns of `long`."""
    return ["", *(f"{length:,} tokens" for length in LENGTHS)]
