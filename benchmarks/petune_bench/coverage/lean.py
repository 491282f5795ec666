"""`python -m petune_bench.coverage.lean`: on which architectures `petune.lean` changes neither losses nor gradients.

It prints a line for each model that does not hold or could not be built, and at last how many hold.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import petune
from petune.core.method.batch import SKIP
from petune.core.registry.plugins import registry
from petune_bench.coverage import tiny

CLOSE = 1e-5
"""How far apart results may be, as a share of the largest entry."""
ZERO = torch.zeros(())
LIMIT = 240.0
"""Seconds that one architecture may take."""


def labelled(model: Any, head: str, rows: int = 4) -> dict[str, Tensor]:
    """A batch of 12 tokens a row, padded on the right, with the labels that a head reads."""
    batch = tiny.batch(model, rows)
    ids = batch["input_ids"]
    lengths = torch.tensor([12, 7, 9, 4]).repeat(len(ids) // 4)
    mask = (torch.arange(12) < lengths[:, None]).long()  # (rows, length)
    batch.pop("decoder_input_ids", None)
    if head == "seq2seq-lm":
        batch["input_ids"] = ids.masked_fill(ids < 4, 5)  # no text ends in between
    batch["attention_mask"] = mask
    return batch | _labels(head, ids, mask)


def _labels(head: str, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    count = torch.arange(len(ids))
    if head == "question-answering":
        return {"start_positions": count % 3, "end_positions": count % 3 + 1}
    if head == "sequence-classification":
        return {"labels": count % 2}
    if head == "token-classification":
        return {"labels": (ids % 2).masked_fill(mask == 0, SKIP)}
    if head == "masked-lm":
        return {"labels": ids.masked_fill((mask == 0) | (ids % 3 > 0), SKIP)}
    return {"labels": ids.masked_fill(mask == 0, SKIP)}


def without_dropout(model: Any) -> None:
    """Let nothing be drawn in training."""
    for holder in (model.config, *model.modules()):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and re.search(r"drop|jitter|^p$", name):
                setattr(holder, name, 0.0)


def step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(the loss, the gradients by name) of one step in training."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def differences(model: Any, batch: dict[str, Tensor], **savings: Any) -> list[float]:
    """How far the loss with savings is from that without, as a share of it, and each gradient, as a share of the
    largest entry of all. A parameter without a gradient counts as one whose gradient is 0: an expert that padding
    alone comes to has one or the other.
    """
    loss, gradients = step(model, batch)
    with petune.lean(model, **savings):
        ours, found = step(model, batch)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    differences = [float((ours - loss).abs() / loss.abs())]
    for name in gradients.keys() | found.keys():
        one, other = gradients.get(name, ZERO), found.get(name, ZERO)
        differences.append(float((one - other).abs().max()) / largest)
    return differences


def verdict(kind: str, head: str, name: str) -> tuple[str, str]:
    """(whether it holds, what was said)."""
    try:
        model = tiny.build(kind, head, name).train()
        without_dropout(model)
        batch = labelled(model, head)
        loss, gradients = step(model, batch)
        again, _ = step(model, batch)
        assert torch.equal(again, loss), "the loss is another each time"
        assert gradients, "no gradients"
    except Exception as error:
        return "not built", _said(error)
    try:
        worst = max(differences(model, batch))
    except Exception as error:
        return "fails", _said(error)
    return ("holds" if worst < CLOSE else "fails"), f"{worst:.0e}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def apart(kind: str, heads: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(head, whether it holds, what was said), from a process of its own."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_work, args=(kind, heads, theirs))
    process.start()
    theirs.close()
    for head in heads:
        told = ("fails", "the process died or took too long")
        try:
            if ours.poll(LIMIT):
                told = ours.recv()
        except EOFError:
            pass
        yield head, *told
    process.kill()
    process.join()


def _work(kind: str, heads: dict[str, str], out: Any) -> None:
    torch.set_num_threads(1)
    for head, name in heads.items():
        out.send(verdict(kind, head, name))


def main() -> None:
    """Run the sweep over all architectures, or those that are named."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    registry().all("petune_sites")  # once, before the processes fork
    known = tiny.architectures()
    count: Counter[str] = Counter()
    for kind in sys.argv[1:] or known:
        for head, status, said in apart(kind, known[kind]):
            count[status] += 1
            if status != "holds":
                print(f"{kind} {head}: {status}: {said}", flush=True)
    print(dict(count))


if __name__ == "__main__":
    main()
