"""LoReFT against its paper's formula at explicit positions, put into the blocks by plain hooks."""

import pytest
import torch
from shaken import shaken

import petune
from petune.testing import tiny_batch, tiny_model
from petune.testing.behaviours import GENERATION


def tuned(**arguments):
    model = tiny_model("llama")
    return model, shaken(model, "loreft", **arguments)


def plain(tuning, ids, n, first, last):
    """The logits of one row, of which the first n tokens are the prompt, with R, W and b applied position by position:
    p <- min(p, floor(n / 2)) and s <- min(s, ceil(n / 2)) where the prompt is shorter than both.
    """
    p, s = (
        (min(first, n // 2), min(last, n - n // 2))
        if n < first + last
        else (first, last)
    )
    base = tiny_model("llama")

    def edit(adapter):
        def hook(module, args, h):
            h = h.clone()
            for position in [*range(p), *range(n - s, n)]:
                edit = adapter.edits[0 if position < p else -1]
                q, _ = torch.linalg.qr(edit.free)  # (hidden, rank)
                h[:, position] += (
                    edit.W @ h[0, position] + edit.b - q.T @ h[0, position]
                ) @ q.T
            return h

        return hook

    for name, adapter in tuning.adapters.items():
        base.get_submodule(name).register_forward_hook(edit(adapter))
    return base(ids[None]).logits[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tied": True},
        {"first": 2, "last": 3},
        {"first": 3, "last": 0},
        {"first": 0, "last": 1},
    ],
)
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_positions_under_padding(arguments, left):
    model, tuning = tuned(**arguments)
    first, last = arguments.get("first", 7), arguments.get("last", 7)
    batch = tiny_batch("llama", rows=3, length=16, padding=5)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if left:
        ids, mask = ids.flip(1), mask.flip(1)
    got = model(
        ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    ).logits
    for row, real, found in zip(ids, mask.bool(), got, strict=True):
        want = plain(tuning, row[real], int(real.sum()), first, last)
        torch.testing.assert_close(found[real], want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_completion_is_not_edited():
    model, tuning = tuned(first=2, last=2)
    ids = tiny_batch("llama", padding=0)["input_ids"][:1]
    labels = ids.clone()
    labels[:, :6] = -100
    got = model(ids, labels=labels).logits[0]
    torch.testing.assert_close(
        got, plain(tuning, ids[0], 6, 2, 2), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(model(ids).logits[0], got, atol=1e-3)


@torch.no_grad()
def test_generation_edits_the_prompt_alone():
    model, tuning = tuned(first=1, last=2)
    batch = tiny_batch("llama")
    ids, mask = batch["input_ids"].flip(1), batch["attention_mask"].flip(1)
    got = model.generate(ids, attention_mask=mask, **GENERATION)
    for row, real, found in zip(ids, mask.bool(), got, strict=True):
        known = row[real]
        n = len(known)
        for _ in range(6):
            known = torch.cat([known, plain(tuning, known, n, 1, 2)[-1:].argmax(-1)])
        assert found[len(row) :].tolist() == known[n:].tolist()


def test_rows_stay_orthonormal():
    _, tuning = tuned(rank=3)
    for edit in tuning.links[0].adapter.edits:
        rotation = edit.rotation()
        torch.testing.assert_close(
            rotation @ rotation.T, torch.eye(3), rtol=0, atol=1e-5
        )


def test_nothing_to_edit_is_a_mistake():
    with pytest.raises(petune.PetuneError, match="leave nothing to edit"):
        petune.attach(tiny_model("llama"), "loreft", first=0, last=0)
