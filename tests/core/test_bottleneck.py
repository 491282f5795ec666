"""The bottleneck's update against its plain form and float64, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from petune.core.ops import bottleneck_update


def parts(dtype=torch.float64):
    torch.manual_seed(0)
    y, x = (torch.randn(2, 3, n, dtype=dtype, requires_grad=True) for n in (5, 4))
    down, up = (nn.Linear(i, o, dtype=dtype) for i, o in ((4, 2), (2, 5)))
    return y, x, down, up


def plain(y, x, down, f, up, scale=1.0):
    return y + scale * up(f(down(x)))


def given(y, x, down, up):
    return [y, x, *down.parameters(), *up.parameters()]


@pytest.mark.parametrize("f", [F.gelu, F.relu, torch.tanh])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_value_and_gradients(f, scale):
    y, x, down, up = parts()
    results = [g(y, x, down, f, up, scale) for g in (bottleneck_update, plain)]
    assert torch.equal(*results)
    with torch.no_grad():
        assert torch.equal(bottleneck_update(y, x, down, f, up, scale), results[0])
    leaves = given(y, x, down, up)
    found = [torch.autograd.grad(r.pow(2).sum(), leaves) for r in results]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_only_wanted_gradients():
    y, x, down, up = parts()
    y.requires_grad_(False)
    down.weight.requires_grad_(False)
    out = bottleneck_update(y, x.detach(), down, F.gelu, up)
    out.sum().backward()
    assert (x.grad, down.weight.grad) == (None, None)
    torch.testing.assert_close(up.bias.grad, torch.full((5,), 6.0).double())


def test_one_tensor_as_both():
    """Behind a layer the update reads what it updates."""
    _, _, down, _ = parts()
    up = nn.Linear(2, 4, dtype=torch.float64)
    h = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h: bottleneck_update(h, h, down, F.gelu, up), [h]
    )


def test_it_keeps_the_input_alone():
    y, x, down, up = parts()
    found = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: found.append(t) or t, lambda t: t
    ):
        bottleneck_update(y, x, down, F.gelu, up)
    assert {t.data_ptr() for t in found} == {
        t.data_ptr() for t in given(y, x, down, up)[1:]
    }


def test_under_autocast():
    y, x, down, up = parts(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = bottleneck_update(y.bfloat16(), x, down, F.gelu, up)
    assert low.dtype == torch.bfloat16
    low.float().sum().backward()
    assert {t.grad.dtype for t in given(y, x, down, up)} == {torch.float32}


def test_compiled():
    y, x, down, up = parts()
    fast = torch.compile(
        lambda y, x: bottleneck_update(y, x, down, F.gelu, up),
        backend="aot_eager",
        fullgraph=True,
    )
    torch.testing.assert_close(fast(y, x), plain(y, x, down, F.gelu, up))


def test_a_second_derivative_says_no():
    y, x, down, up = parts()
    out = bottleneck_update(y, x, down, F.gelu, up)
    (grad,) = torch.autograd.grad(out.pow(2).sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
