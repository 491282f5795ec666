"""The low-rank update against float64 and against the plain form, and what it keeps."""

import pytest
import torch

from petune.ops import lowrank_update


def tensors(dtype=torch.float64, out=5):
    torch.manual_seed(0)
    shapes = {"y": (2, 3, out), "x": (2, 3, 4), "a": (2, 4), "b": (out, 2)}
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes.values()]


def test_gradients_by_finite_differences():
    assert torch.autograd.gradcheck(lambda *t: lowrank_update(*t, 0.7), tensors())


@pytest.mark.parametrize("needs", [(1, 0, 1, 1), (0, 1, 1, 1), (0, 0, 1, 0), (1, 1, 0, 0)])
def test_only_wanted_gradients(needs):
    given = [t.requires_grad_(bool(n)) for t, n in zip(tensors(), needs, strict=True)]
    lowrank_update(*given, 0.5).sum().backward()
    got = [t.grad for t in given]
    y, x, a, b = plain = [t.detach().clone().requires_grad_(bool(n)) for t, n in zip(given, needs, strict=True)]
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


def test_it_keeps_the_input_alone():
    y, x, a, b = tensors(torch.float32, out=64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lowrank_update(y, x, a, b)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), a.data_ptr(), b.data_ptr()}


def test_a_second_derivative_says_no():
    y, x, a, b = tensors()
    (grad,) = torch.autograd.grad(lowrank_update(y, x, a, b).pow(2).sum(), [a], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
