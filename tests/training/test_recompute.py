"""What the recomputing forward gives, beside plain autograd: programs drawn at random, and each way to trip it up."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petune.training.recompute.forward import Again, Watch, watched
from petune.training.recompute.sources import Kept, Source

# Operations on tensors of (4, 6); the last of them read or write in place.
PURE = {
    "gelu": lambda x, y: F.gelu(x),
    "silu": lambda x, y: F.silu(x),
    "mul": lambda x, y: x * y,
    "add": lambda x, y: x + y,
    "div": lambda x, y: x / (1 + y * y),
    "exp": lambda x, y: (x * 0.1).exp(),
    "tanh": lambda x, y: x.tanh(),
    "where": lambda x, y: torch.where(x > y, x, y * 2),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, 0.5),
    "softmax": lambda x, y: x.softmax(-1) * y,
    "log_softmax": lambda x, y: x.log_softmax(0),
    "layer_norm": lambda x, y: F.layer_norm(x, (6,)),
    "rms": lambda x, y: x * (x.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt(),
    "dropout": lambda x, y: F.dropout(x, 0.4),
    "matmul": lambda x, y: x @ y.T @ y,
    "transposed": lambda x, y: (x.T.contiguous() * y.T).T.sin(),
    "strided": lambda x, y: torch.cat([x[:, ::2], y[:, 1::2]], -1).sigmoid(),
    "expanded": lambda x, y: x * y[:1].expand(4, 6),
    "chunk": lambda x, y: torch.cat([t.cos() for t in x.chunk(2, -1)], -1) * y,
    "gather": lambda x, y: x.gather(1, y.argsort(1)),
    "index": lambda x, y: x[y.sum(1).argsort()] * y,
    "complex": lambda x, y: torch.view_as_real(
        torch.view_as_complex(x.reshape(4, 3, 2).contiguous())
        * torch.polar(torch.ones(3), torch.arange(3.0))
    ).reshape(4, 6),
    "conjugated": lambda x, y: (
        torch.complex(x, y).conj() * torch.complex(y, x).imag
    ).abs(),
    "real part": lambda x, y: torch.complex(x, y).conj().imag * y,
    "half": lambda x, y: (x.bfloat16() * y.bfloat16()).float(),
    "cumsum": lambda x, y: x.cumsum(-1) * y,
    "norm": lambda x, y: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-3),
    "max": lambda x, y: x * y.amax(0),
    "std": lambda x, y: (x - x.mean()) / (x.std() + 1),
    "pad": lambda x, y: F.pad(x * y, (1, 1))[:, 1:-1],
    "rolled": lambda x, y: x.roll(1, -1) * y.sin(),
    "flip": lambda x, y: x.flip(0) * y,
    "topk": lambda x, y: x.topk(6, -1).values * y,
    "embedding": lambda x, y: F.embedding(y.argsort(0)[:, 0], x) * x,
    "attention": lambda x, y: F.scaled_dot_product_attention(
        x[None, None], y[None, None], x[None, None]
    )[0, 0],
}


def _views_added(x, y):
    z = x * 1.5
    z[:, 1:3].add_(y[:, :2])
    return z * z


def _put(x, y):
    z = x.clone()
    z.index_put_((torch.tensor([0, 2]),), y[:2])
    return z.sin()


def _copied(x, y):
    z = torch.empty_like(x)
    z[:2].copy_(x[:2])
    z[2:].copy_(y[2:])
    return z * z


def _saved_then_changed(x, y):
    """A tensor that a product needs is changed afterwards, of which it must not know."""
    z = x * 2
    w = z.detach().clone()
    v = w * y  # keeps w
    w.add_(1)
    return v * w


def _transposed_in_place(x, y):
    z = (x * y).T
    z.t_()
    return z.relu_() * y


def _out(x, y):
    with torch.no_grad():
        z = torch.empty(4, 6)
        torch.mul(x, y, out=z)
    return z * x


def _foreign_in_place(x, y):
    z = torch.zeros(4, 6)
    z[0] = x[0]
    z += y
    z.mul_(x)
    return z


CHANGING = {
    "relu_": lambda x, y: (x * y).relu_() * y,
    "add_": lambda x, y: (x * 2).add_(y).mul_(y).sigmoid_(),
    "masked_fill_": lambda x, y: (x + 1).masked_fill_(y > 0, 0.0) * y,
    "views": _views_added,
    "index_put_": _put,
    "copy_": _copied,
    "saved then changed": _saved_then_changed,
    "t_": _transposed_in_place,
    "out=": _out,
    "setitem": _foreign_in_place,
    "zero_": lambda x, y: x * (y * 1).zero_() + y,
    "clamp_": lambda x, y: (x * y).clamp_(-1, 1) * x,
    "dropout_": lambda x, y: F.dropout(x * y, 0.3, inplace=True) * y,
    "silu_": lambda x, y: F.silu(x + y, inplace=True) * x,
    "scatter_": lambda x, y: (
        (x * 1).scatter_(1, torch.zeros(4, 1).long(), y[:, :1]) * y
    ),
    "fill_diagonal_": lambda x, y: (x * 1).fill_diagonal_(0.25) * y,
    "unsqueeze_": lambda x, y: (x * y).unsqueeze_(0).squeeze_(0).exp(),
    "addmm_": lambda x, y: (x * 1).addmm_(y, (y.T @ y).float(), alpha=0.1) * x,
    "detached": lambda x, y: x * (x * y).detach().add_(1),
    "uniform_": lambda x, y: x * torch.empty_like(y).uniform_() * y,
    "bernoulli_": lambda x, y: x * torch.empty_like(y).bernoulli_(0.5) * y,
    "bernoulli_ on a view": lambda x, y: _drawn_on_a_view(x, y),
}


def _drawn_on_a_view(x, y):
    z = torch.ones(4, 12)
    z[:, ::2].bernoulli_(0.5)
    return x * z[:, ::2] * y * z[:, 1::2]


OPERATIONS = PURE | CHANGING


def run(program, lean, autocast=False):
    """The results and gradients of a program, a list of (operation, its first input, its second)."""
    torch.manual_seed(0)
    leaves = [torch.randn(4, 6, requires_grad=True) for _ in range(3)]
    found = list(leaves)
    cast = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with watched(0) if lean else nullcontext(), cast:
        for name, first, second in program:
            one, other = found[first % len(found)], found[second % len(found)]
            found.append(OPERATIONS[name](one, other).float())
    total = sum(f.float().sum() * (i + 1) for i, f in enumerate(found[3:]))
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [f.detach() for f in found], gradients, torch.rand(1)


def same(program, autocast=False):
    try:
        plain = run(program, lean=False, autocast=autocast)
    except RuntimeError as refused:
        if "modified by an inplace operation" in str(refused):
            return  # watched, it may be right or refused
        raise
    ours = run(program, lean=True, autocast=autocast)
    for got, want in zip(ours, plain, strict=True):
        for one, other in zip(got, want, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("autocast", [False, True])
def test_each_operation(name, autocast):
    same([("mul", 0, 1), (name, 3, 2), ("mul", 4, 3)], autocast)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(OPERATIONS)),
            st.integers(0, 9),
            st.integers(0, 9),
        ),
        min_size=2,
        max_size=8,
    ),
    st.booleans(),
)
def test_programs(program, autocast):
    same(program, autocast)


class Doubled(torch.autograd.Function):
    """Keeps its input and its result."""

    @staticmethod
    def forward(ctx, x):
        out = x.exp()
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, out = ctx.saved_tensors
        return grad * out + 0 * x


def block(x, weight):
    """A gated MLP behind a norm, and a sum."""
    h = F.layer_norm(x, (6,))
    gate, up = (h @ weight).chunk(2, -1)
    return x + (F.silu(gate) * up) @ weight.T[:6]


def inputs():
    torch.manual_seed(0)
    x = torch.randn(4, 6, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(6, 12) * 0.3)
    return x, weight


def computed(lean, function):
    """The gradients of what a function makes of inputs."""
    given = inputs()
    with watched(0) if lean else nullcontext():
        out = function(*given)
    out.square().sum().backward()
    return [one.grad for one in given]


def equal(function):
    for one, other in zip(*(computed(lean, function) for lean in (0, 1)), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_own_functions():
    equal(lambda x, w: Doubled.apply(block(Doubled.apply(x * 0.1), w)) * x)


def test_the_result_of_an_own_function_is_changed_in_place():
    def changed(x, w):
        y = Doubled.apply(x)
        z = y * x  # keeps y as it is here
        y.add_(1)
        return block(z, w) * y

    # plain autograd refuses; the gradient is that of the same program without a change in place
    given = inputs()
    with watched(0):
        ours = changed(*given)
    y = Doubled.apply(given[0])
    plain = block(y * given[0], given[1]) * (y + 1)
    grads = [torch.autograd.grad(r.square().sum(), given) for r in (ours, plain)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_hooks_change_gradients_as_ever():
    def hooked(x, w):
        y = block(x, w)
        y.register_hook(lambda grad: grad * 2)
        z = F.gelu(y)
        z.grad_fn.register_hook(lambda into, out: None)
        return block(z, w)

    equal(hooked)


def test_a_leaf_is_kept_for_several():
    equal(lambda x, w: x * x + (x * x.detach()).sin() + x.exp() * x[:, :1].expand(4, 6))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside(reentrant):
    again = torch.utils.checkpoint.checkpoint
    equal(lambda x, w: block(again(block, x, w, use_reentrant=reentrant), w))


def test_backward_twice():
    given = inputs()
    with watched(0):
        out = block(block(*given), given[1]).square().sum()
    first = torch.autograd.grad(out, given, retain_graph=True)
    second = torch.autograd.grad(out, given)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, given)


def test_part_of_backward_after_part():
    """What one part remembers is no other than what the next needs."""
    found = []
    for lean in (False, True):
        x, w = inputs()
        with watched(0) if lean else nullcontext():
            y = F.gelu(x @ w)
            parts = y.sin().sum(), (y * y).sum(), F.softmax(y, -1).square().sum()
        grads = [torch.autograd.grad(p, [x, w], retain_graph=True) for p in parts]
        found.append([g for part in grads for g in part])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_second_derivatives():
    """Those of torch's operations; an activation's is its own operation's."""

    def smooth(x):
        h = F.layer_norm(x, (6,)).tanh()
        return F.gelu(h * x) * h.softmax(-1)

    found = []
    for lean in (False, True):
        x, _ = inputs()
        with watched(0) if lean else nullcontext():
            out = smooth(x).sum()
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0])


def test_a_leaf_changed_after_the_forward_is_refused():
    """As autograd does; not if nothing that backward reads has changed."""
    x, w = inputs()
    with watched(0):
        out = block(x, w).sum()
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(6, 12\).*changed in place"):
        out.backward()


def test_a_result_changed_after_the_forward():
    """What is computed again is as it was, so that nothing has to be refused."""
    found = []
    for change in (False, True):
        x, _ = inputs()
        with watched(0):
            y = x.exp() + 1
            out = (y.sin() * 2).sum()
        if change:
            y.detach().zero_()
        found.append(torch.autograd.grad(out, x)[0])
    assert torch.equal(*found)


def test_a_kept_result_changed_after_the_forward_is_refused():
    x, _ = inputs()
    with watched(0):
        y = x.cumsum(0)  # which is not computed again
        out = (y * y).sum()
    y.detach().zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        out.backward()


def alive():
    gc.collect()
    kinds = (Source, Kept, Again, Watch)
    return sum(issubclass(type(one), kinds) for one in gc.get_objects())


def forward_only(x, w):
    with watched(0):
        return block(block(x, w), w).sum()


def with_backward(x, w):
    forward_only(x, w).backward()
    x.grad = w.grad = None


def interrupted(x, w):
    def fails():
        with watched(0):
            return block(x, w).sin().sum() / (1 // 0)

    with pytest.raises(ZeroDivisionError):
        fails()


def interrupted_backward(x, w):
    with watched(0):
        y = block(x, w)
        y.register_hook(lambda grad: 1 // 0)
        out = block(y, w).sum()
    with pytest.raises(ZeroDivisionError):
        out.backward()
    x.grad = w.grad = None


@pytest.mark.parametrize(
    "step", [forward_only, with_backward, interrupted, interrupted_backward]
)
def test_nothing_is_left_after_many_steps(step):
    x, w = inputs()
    step(x, w)
    before = alive()
    out = forward_only(x, w)
    assert alive() > before
    del out
    for _ in range(200):
        step(x, w)
    assert alive() <= before


def test_a_result_that_is_discarded_takes_everything_along():
    """At once, and not when the garbage collector comes round."""
    x, w = inputs()
    kept = []
    with watched(0):
        y = block(x, w)
        kept.append(weakref.ref(y))
        out = block(y, w).sum()
    gc.collect()
    gc.disable()
    try:
        del y, out
        assert kept[0]() is None
    finally:
        gc.enable()


def test_random_numbers_go_on_as_they_would():
    """After backward too, which draws the same masks once more."""
    found = []
    for lean in (False, True):
        x, w = inputs()
        torch.manual_seed(3)
        with watched(0) if lean else nullcontext():
            out = F.dropout(block(F.dropout(x, 0.5), w), 0.1).sum()
        out.backward()
        found.append((x.grad, torch.rand(3)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
