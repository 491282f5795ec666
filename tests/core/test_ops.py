"""The operations against float64 and against their plain forms, and what they keep."""

import pytest
import torch
from shaken import shaken
from torch.utils.checkpoint import checkpoint

from petune.core.ops import lowrank_update, recompute
from petune.testing import tiny_batch, tiny_model

NEEDS = [
    (1, 0, 1, 1),
    (0, 1, 1, 1),
    (0, 0, 1, 0),
    (1, 1, 0, 0),
    (0, 1, 0, 0),
    (0, 0, 0, 1),
]


def tensors(dtype=torch.float64, out=5, rows=(2, 3)):
    torch.manual_seed(0)
    shapes = {"y": (*rows, out), "x": (*rows, 4), "a": (2, 4), "b": (out, 2)}
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes.values()]


def seeded(function, *given, **options):
    torch.manual_seed(1)
    return function(*given, **options)


def kept(function):
    """Addresses of what autograd keeps."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: found.append(t) or t, lambda t: t
    ):
        function()
    return {t.data_ptr() for t in found}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rows", [(6,), (2, 3)])
def test_gradients_by_finite_differences(rows, dropout):
    given = tensors(rows=rows)
    assert torch.autograd.gradcheck(
        lambda *t: seeded(lowrank_update, *t, 0.7, dropout=dropout), given
    )


def test_inputs_that_are_not_contiguous():
    y, x, a, b = tensors()
    given = [
        y.transpose(0, 1),
        x.transpose(0, 1),
        a.T.contiguous().T,
        b.T.contiguous().T,
    ]
    assert not any(t.is_contiguous() for t in given)
    torch.testing.assert_close(
        lowrank_update(*given, 0.7), given[0] + 0.7 * given[1] @ a.T @ b.T
    )
    assert torch.autograd.gradcheck(
        lambda y, x, a, b: lowrank_update(
            y.transpose(0, 1), x.transpose(0, 1), a.T.contiguous().T, b, 0.7
        ),
        [y, x, a, b],
    )


@pytest.mark.parametrize("needs", NEEDS)
def test_only_wanted_gradients(needs):
    given = [t.requires_grad_(bool(n)) for t, n in zip(tensors(), needs, strict=True)]
    lowrank_update(*given, 0.5).sum().backward()
    got = [t.grad for t in given]
    y, x, a, b = plain = [
        t.detach().clone().requires_grad_(bool(n))
        for t, n in zip(given, needs, strict=True)
    ]
    (y + 0.5 * x @ a.T @ b.T).sum().backward()
    for one, other in zip(got, [t.grad for t in plain], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_mixed_dtypes_follow_the_base():
    y, x, a, b = tensors(torch.float32)
    low = lowrank_update(y.bfloat16(), x.bfloat16(), a, b, 2.0)
    assert low.dtype == torch.bfloat16
    low.float().sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32
    torch.testing.assert_close(low.float(), y + 2 * x @ a.T @ b.T, rtol=0.05, atol=0.1)


def test_under_autocast():
    layer, (_, x, a, b) = torch.nn.Linear(4, 5), tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = lowrank_update(layer(x), x, a, b, 2.0, dropout=0.2)
    assert low.dtype == torch.bfloat16
    low.float().sum().backward()
    assert {t.grad.dtype for t in (x, a, b)} == {torch.float32}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_keeps_the_input_alone(dropout):
    y, x, a, b = tensors(torch.float32, out=64)
    found = kept(lambda: lowrank_update(y, x, a, b, dropout=dropout))
    assert {x.data_ptr(), a.data_ptr(), b.data_ptr()} <= found
    assert len(found) == 3 + bool(dropout)  # and the seed


def test_a_second_derivative_says_no():
    y, x, a, b = tensors()
    for out in (lowrank_update(y, x, a, b), recompute(torch.sin, a)):
        (grad,) = torch.autograd.grad(out.pow(2).sum(), [a], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
def test_dropout_is_the_plain_form_with_what_it_drops(p):
    """An identity for A and B shows the dropped input; its share of zeros and its mean are those of a dropout."""
    x = torch.ones(100, 2000, dtype=torch.float64)
    eye = torch.eye(2000, dtype=torch.float64)
    dropped = seeded(lowrank_update, torch.zeros_like(x), x, eye, eye, dropout=p)
    assert set(dropped.unique().tolist()) <= {0.0, 1 / (1 - p)}
    spread = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(float((dropped == 0).double().mean()) - p) < 5 * spread
    both = float(
        ((dropped[:, 1:] == 0) & (dropped[:, :-1] == 0)).double().mean()
    )  # neighbours are independent
    assert abs(both - p * p) < 6 * (p * p / x.numel()) ** 0.5
    assert not torch.equal(
        dropped, lowrank_update(torch.zeros_like(x), x, eye, eye, dropout=p)
    )


def test_dropout_forward_and_backward_drop_the_same():
    y, x, a, b = tensors()
    eye, wide = (
        torch.eye(4, dtype=torch.float64),
        torch.zeros(2, 3, 4, dtype=torch.float64),
    )
    mask = seeded(lowrank_update, wide, torch.ones_like(x), eye, eye, dropout=0.3)
    out = seeded(lowrank_update, y, x, a, b, 0.5, dropout=0.3)
    plain = y + 0.5 * (x * mask) @ a.T @ b.T
    torch.testing.assert_close(out, plain)
    for one, other in zip(
        *(torch.autograd.grad(o.pow(2).sum(), [y, x, a, b]) for o in (out, plain)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_dropout_under_gradient_checkpointing():
    given = tensors()
    plain = torch.autograd.grad(
        seeded(lowrank_update, *given, dropout=0.3).pow(2).sum(), given
    )

    def again():
        return (
            checkpoint(
                lambda *t: lowrank_update(*t, dropout=0.3), *given, use_reentrant=False
            )
            .pow(2)
            .sum()
        )

    for one, other in zip(
        torch.autograd.grad(seeded(again), given), plain, strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_methods_with_dropout_train_and_switch_it_off(method, precision):
    model, batch = tiny_model("llama", precision), tiny_batch("llama")
    tuning = shaken(model, method, dropout=0.5)
    assert torch.equal(model(**batch).loss, model(**batch).loss)
    model.train()
    first, second = model(**batch).loss, model(**batch).loss
    assert not torch.equal(first, second)
    first.backward()
    assert all(p.grad.isfinite().all() for p in tuning.parameters())


def test_recompute_gradients_and_what_it_keeps():
    _, x, a, _ = tensors()

    def gated(x, a):
        return torch.tanh(x @ a.T).square() * 3

    assert torch.autograd.gradcheck(lambda x, a: recompute(gated, x, a), [x, a])
    assert kept(lambda: recompute(gated, x, a)) == {x.data_ptr(), a.data_ptr()}
    recompute(gated, x, a.detach()).sum().backward()
    assert (x.grad is None, a.grad) == (False, None)
    with torch.autocast("cpu", torch.bfloat16):
        low = recompute(gated, x.float(), a.float())
    low.float().sum().backward()
    assert low.dtype == torch.bfloat16
    assert a.grad is not None


def test_dropout_compiled():
    given = tensors()
    fast = torch.compile(
        lambda *t: lowrank_update(*t, 0.5, dropout=0.3),
        backend="aot_eager",
        fullgraph=True,
    )
    plain, ours = (
        seeded(f, *given, **more)
        for f, more in ((lowrank_update, {"scale": 0.5, "dropout": 0.3}), (fast, {}))
    )
    torch.testing.assert_close(ours, plain)
    for one, other in zip(
        *(torch.autograd.grad(o.pow(2).sum(), given) for o in (ours, plain)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
