"""Six architectures by lot: twenty steps with savings are the plain loop's.

For each head a shuffle of its architectures' names by `random.Random(12)`, of which the first that can be built small
and trained are taken: two for causal-lm and seq2seq-lm, one for the others.
"""

import random
from contextlib import nullcontext

import pytest
import torch

import petune
from petune.training.recompute import forward
from petune_bench.coverage import tiny
from petune_bench.coverage.lean import labelled, without_dropout

SEED, STEPS = 12, 20
COUNTS = {
    "causal-lm": 2,
    "masked-lm": 1,
    "sequence-classification": 1,
    "seq2seq-lm": 2,
}
LOT = [
    ("longcat_flash", "causal-lm"),
    ("iquestcoder", "causal-lm"),
    ("albert", "masked-lm"),
    ("camembert", "sequence-classification"),
    ("omniasr", "seq2seq-lm"),
    ("led", "seq2seq-lm"),
]
"""What `by_lot` gives with transformers 5.24."""


def by_lot():
    """(architecture, head) in the order in which they are drawn."""
    draw = random.Random(SEED)
    for head, count in COUNTS.items():
        names = [kind for kind, heads in tiny.architectures().items() if head in heads]
        draw.shuffle(names)
        usable = (k for k in names if built(k, head) is not None)
        yield from ((next(usable), head) for _ in range(count))


def built(kind, head):
    try:
        model = tiny.build(kind, head, tiny.architectures()[kind][head]).train()
        loss = model(**labelled(model, head)).loss
        loss.backward()
    except Exception:  # what can't be built small and offline is passed over
        return None
    model.zero_grad()
    return model


def trained(model, batch, context):
    """(losses, gradients of the last step) of twenty steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    with context:
        for step in range(STEPS):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return losses, found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head"), LOT)
@pytest.mark.parametrize("dropout", [False, True])
def test_twenty_steps(kind, head, dropout, monkeypatch):
    """With dropout, which is drawn for other tokens where there is no padding, the batch stays as it is: then losses
    and gradients are the same to the last bit.
    """
    monkeypatch.setattr(forward, "LEAST", 0)
    plain, ours = built(kind, head), built(kind, head)
    batch = labelled(plain, head)
    if not dropout:
        without_dropout(plain)
        without_dropout(ours)
    losses, gradients = trained(plain, batch, nullcontext())
    off = {"packing": False, "labelled_logits": False} if dropout else {}
    found, others = trained(ours, batch, petune.lean(ours, **off))
    assert others.keys() == gradients.keys()
    if dropout:
        assert found == losses
        for name, one in gradients.items():
            assert torch.equal(others[name], one), name
        return
    assert found == pytest.approx(losses, rel=1e-5)
    # of all, since that of a key's bias is 0 but for rounding
    close = 1e-5 * max(float(one.abs().max()) for one in gradients.values())
    for name, one in gradients.items():
        torch.testing.assert_close(others[name], one, rtol=0, atol=close)
