"""`python -m petune_bench.performance --out docs/performance.md`: measure, print, and write the page."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from petune.training.setup import quietly
from petune_bench.environment import machine, versions
from petune_bench.options import Parser
from petune_bench.performance import decoding, kinds, measure, methods, serving
from petune_bench.performance.contenders import rows
from petune_bench.performance.race import apart, ratios, sgemm_rate

HEAD = """# Performance

LoRA of rank 16 on all linear layers of SmolLM2-135M, beside PEFT with transformers' Trainer and its defaults: the same
rows in the same batches, the same adapter weights at the start, the loss on the completion alone. The contenders take
their steps in turns, in one process, so that what disturbs the machine disturbs all of them; times are medians, and a
share is the median of the shares on each batch. `python -m petune_bench.performance --out docs/performance.md` writes
this page.
"""
FIRST = """## A step

{steps} steps of 8 questions and answers (`nq-sample`), {tokens} tokens and {labelled} labelled ones a step on average,
fp32. *petune* is `petune train` as it comes, *compiled* with `training.compile=regions`. *Memory* is the peak of a step
above the loaded base, *kept* what autograd keeps of it for backward. *sgemm* is the frozen base's floor (4 operations
for a parameter of the blocks and token, and for one of the head and labelled token) as a share of the step:
{floor:.2f} s at this machine's own {rate:.0f} GFLOP/s. *Loss* is the largest relative difference from PEFT's over all
steps.
"""
ENCODER = """## An encoder

MiniLM learns to tell sentences of movie reviews apart, as in the quickstart: nf4, LoRA at its defaults, {steps} batches
of 32 sentences in a random order, of which four tenths are padding. *petune* is a plain loop within `petune.lean`.
*First two* are the seconds of the first two steps, in which blocks are compiled.
"""
SEQ2SEQ = """## An encoder-decoder

A T5 of 60 million random parameters in fp32 with LoRA of rank 16: {steps} batches of 8 sources of 32 to 128 tokens and
targets of 8 to 48.
"""
LOOPS = """## In everybody's own loop

SmolLM2-135M with LoRA of rank 16, {steps} batches as in the first table: a loop in plain torch and transformers' own
Trainer, without `petune.lean` and within it, beside PEFT in Trainer.
"""
LONG = """## Long rows

One row of SmolLM2-135M with LoRA of rank 16 in fp32, its second half labelled: megabytes at the peak above the base,
with the share of PEFT's, and megabytes kept for backward. What attention computes grows with the square of the length,
what is kept with the length alone.
"""
SHARES = ["", "step, s", "time", "first two, s", "memory", "kept"]
KEPT = """## Memory

One step of 2 × 128 tokens, the last 16 of each labelled: KB a token kept for backward and MB at the peak above the
base, with the share of PEFT's in brackets.
"""
SETTINGS = """## Settings

Keys of a recipe's `training`, none of which changes the result beyond rounding (8-bit optimizers round their states).
[`petune.lean`](lean.md) gives the first ones to any other loop.

| key | what it does |
| --- | --- |
| `labelled_logits` (on) | the head is applied where there is a label, 128 rows at a time |
| `recompute` (on) | what costs next to nothing (norms, activations, gates, dropout, …) is computed again in backward |
| `group_by_length` (on) | rows of like length share a batch |
| `packing` (on where the model can) | rows end to end: no padding but in the attention, which sees them as rows |
| `compile: regions` | every block by `torch.compile`, which keeps what is costly and computes the rest again |
| `memory_budget` | functorch's `activation_memory_budget` for compiled blocks, from 1 (all that it would keep) to 0 |
| `gradient_checkpointing` | `true`: blocks keep their input alone; `3`: every third block |
| `optimizer` | any of Trainer's: `adamw_8bit`, and on CUDA the paged ones |
| `tile` | MLPs work on so many tokens at a time and keep their input alone; for long rows |
| `offload` | on CUDA: what is kept for backward waits in the CPU's memory |
| `liger` | on CUDA: the Liger kernels for norms, rotations and gated MLPs, where `liger-kernel` is installed |

Each alone beside the defaults, on batches of 4 rows of 60 to 192 tokens: shares of the default's time, peak and bytes
kept, and the largest relative difference of the loss. What needs CUDA was not measured.
"""
SERVING = """## Attach, switch, route

Attaching to and switching on a Llama of 224 linear layers; a forward of 8 × 128 tokens through SmolLM2 with one LoRA
for all rows and with another for each of the 8.
"""
DECODING = """## Decoding

One token at a time by `generate` with a cache, greedily, from a prompt of {prompt} tokens: SmolLM2-135M in fp32 with
{threads} threads, and on it LoRA of rank {rank} on all linear layers, OFT, and prompts and prefixes at their defaults.
{turns} turns of {tokens} new tokens each, models in turns; the first token, which is the prompt's, is left out. A
turn's time is the median over its tokens; *token* and the shares are medians over the turns. *Quick* is what one token
in ten stays under, which tells more where other programs share the machine.
"""


def main() -> None:
    """Measure and write."""
    parser = Parser(prog="python -m petune_bench.performance", description=__doc__)
    parser.add_argument("--out", type=Path, help="the page to write")
    parser.add_argument(
        "--steps", type=int, default=20, help="steps of the first table (20)"
    )
    parser.add_argument(
        "--short", type=int, default=4, help="timed steps of the others (4)"
    )
    parser.add_argument(
        "--only", choices=list(PARTS), action="append", help="these parts alone"
    )
    given = parser.parse_args()
    began = time.perf_counter()
    sections: dict[str, str] = {}
    with quietly():
        for name in given.only or PARTS:
            sections[name] = _section(PARTS[name](given))
    ran_on = _ran_on((time.perf_counter() - began) / 60)
    print(ran_on)
    if given.out:
        write(given.out, sections, ran_on)


def write(out: Path, sections: dict[str, str], ran_on: str) -> None:
    """The page; where only some parts were measured, their sections alone change, each with a line on its run."""
    if set(sections) == set(PARTS) or not out.exists():
        text = "\n".join([HEAD, *sections.values(), ran_on, ""])
    else:
        text = out.read_text(encoding="utf-8")
        for section in sections.values():
            text = replaced(text, f"{section}\nIn a run of its own: {ran_on}\n")
    out.write_text(text, encoding="utf-8")


def replaced(page: str, section: str) -> str:
    """The page with this section in place of the one under the same heading, or before its last line if it has none."""
    heading = section.partition("\n")[0]
    body, last = page.rstrip("\n").rsplit("\n\n", 1)
    head, *others = f"{body}\n".split("\n## ")
    known = [f"## {other.strip()}\n" for other in others]
    headings = [other.partition("\n")[0] for other in known]
    if heading in headings:
        known[headings.index(heading)] = section
    else:
        known.append(section)
    return "\n".join([f"{head.strip()}\n", *known, f"{last}\n"])


def _section(lines: Iterable[str]) -> str:
    """A part's lines as text, each printed as soon as it is known."""
    found = []
    for line in lines:
        print(line, flush=True)
        found.append(line)
    return "\n".join([*found, ""])


def _ran_on(minutes: float) -> str:
    """The machine, the time and the versions, as a sentence."""
    facts, threads = machine(), torch.get_num_threads()
    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"On {facts['cpu']}, {facts['cores']} cores ({threads} threads), {minutes:.0f} minutes. "
        f"Versions: {installed}."
    )


def first(given: argparse.Namespace) -> Iterator[str]:
    rate = sgemm_rate()
    times, memory, tokens, labelled = measure.main_race(given.steps)
    rate = max(rate, sgemm_rate())
    floor, sgemm = measure.shares_of_sgemm(times, tokens, labelled, rate)
    yield FIRST.format(
        steps=given.steps,
        tokens=tokens,
        labelled=labelled,
        rate=rate / 1e9,
        floor=floor,
    )
    peer = times["PEFT"]
    table = []
    for (name, found), share in zip(times.items(), sgemm, strict=True):
        peak, kept = (
            mine / theirs
            for mine, theirs in zip(memory[name], memory["PEFT"], strict=True)
        )
        step = f"{found.median:.2f} ± {found.median * found.spread:.2f}"
        table.append([name, step, f"{ratios(found, peer):.2f}", f"{found.warm_up:.0f}", f"{peak:.2f}", f"{kept:.2f}",
                      share, f"{apart(found, peer):.0e}"])  # fmt: skip
    yield from rows_of(
        ["", "step, s", "time", "first two, s", "memory", "kept", "sgemm", "loss"],
        table,
    )
    yield ""
    heads = ["", "PEFT's step", "petune", "petune, compiled", "loss"]
    yield from rows_of(heads, measure.other_precisions(given.short))


def encode(given: argparse.Namespace) -> Iterator[str]:
    yield ENCODER.format(steps=kinds.STEPS)
    yield from rows_of(SHARES, kinds.encoder())


def translate(given: argparse.Namespace) -> Iterator[str]:
    yield SEQ2SEQ.format(steps=kinds.STEPS)
    yield from rows_of(SHARES, kinds.seq2seq())


def loop(given: argparse.Namespace) -> Iterator[str]:
    yield LOOPS.format(steps=kinds.STEPS)
    heads = ["", "step, s", "time", "kept in bf16", "memory in fp32"]
    yield from rows_of(heads, kinds.loops())


def lengthen(given: argparse.Namespace) -> Iterator[str]:
    yield LONG
    yield from rows_of(kinds.heads_of_long(), kinds.long())


def kept(given: argparse.Namespace) -> Iterator[str]:
    yield KEPT
    task, _ = rows("nq-sample", 1, 128)
    columns = ["PEFT", "petune", "compiled"]
    yield from rows_of(
        ["", *(f"kept, {c}" for c in columns), *(f"peak, {c}" for c in columns)],
        measure.kept(task),
    )


def settings(given: argparse.Namespace) -> Iterator[str]:
    yield SETTINGS
    yield from rows_of(
        ["setting", "time", "memory", "kept", "loss"], measure.settings(given.short)
    )


def serve(given: argparse.Namespace) -> Iterator[str]:
    yield SERVING
    found = serving.attach_and_switch()
    routed = serving.route()
    table = []
    for what in ("attach", "switch"):
        ours, theirs = found[what], found[f"{what}, PEFT"]
        table.append(
            [
                what,
                _duration(ours),
                _duration(theirs),
                f"{serving.share(ours, theirs):.2g}",
            ]
        )
    shares = [
        serving.share(routed[f"routed{who}"], routed[f"one{who}"])
        for who in ("", ", PEFT")
    ]
    table.append(
        [
            "8 LoRAs routed, share of one LoRA's time",
            *(f"{share:.2f}" for share in shares),
            "–",
        ]
    )
    yield from rows_of(["", "petune", "PEFT", "share"], table)


def decode(given: argparse.Namespace) -> Iterator[str]:
    yield DECODING.format(
        prompt=decoding.PROMPT,
        threads=decoding.THREADS,
        rank=decoding.RANK,
        turns=decoding.TURNS,
        tokens=decoding.TOKENS,
    )
    heads = ["", "token, s", "of the base", "of PEFT's LoRA"]
    yield from rows_of([*heads, "quick, s", "of the base"], decoding.measured())


PARTS = {
    "step": first,
    "encoder": encode,
    "seq2seq": translate,
    "lean": loop,
    "long": lengthen,
    "memory": kept,
    "methods": lambda given: methods.section(),
    "settings": settings,
    "serving": serve,
    "decode": decode,
}


def rows_of(heads: list[str], table: Iterable[list[str]]) -> Iterator[str]:
    """A table's lines, each as soon as it is known."""
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for row in table:
        yield f"| {' | '.join(row)} |"


def _duration(times: list[float]) -> str:
    seconds = statistics.median(times)
    return f"{seconds * 1000:.0f} ms" if seconds > 1e-3 else f"{seconds * 1000:.3f} ms"


if __name__ == "__main__":
    main()
