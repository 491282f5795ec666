"""MLPs that work on a slice of the sequence at a time, and keep for backward nothing but what goes into them.

What an MLP finds inside is several times as wide as the stream, so that on long sequences it is most of what backward
keeps. The idea is ALST's tiled MLP (Bekman et al. 2025, arXiv:2506.13996).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from petune.core.forward.forward_pass import Remembering
from petune.core.frozen.modules import base_forward, features, walk
from petune.core.frozen.weights import compute_dtype
from petune.core.graft.board import board_of
from petune.core.registry.sites import find_sites
from petune.errors import PetuneError
from petune.training.logits import is_routed
from petune.training.recompute.random import drawing_from, random_state
from petune.training.swap import base_forward_as, evaluating

Run = Callable[[Tensor], Tensor]


@contextmanager
def tiled(model: nn.Module, size: int) -> Iterator[None]:
    """Within the context the MLPs of a model work on so many tokens at a time, where gradients are on.

    An MLP that a trial shows to mix tokens, or to give more than a tensor, is left alone, as are those of a batch whose
    rows go different ways, and those with an adapter inside that acts by position.

    Args:
        size: the tokens of a slice.

    Raises:
        PetuneError: the model has no MLP that could.
    """
    found = mlps(model)
    if not found:
        raise PetuneError(
            "training.tile: no MLP of this model works on slices of a sequence; leave it out."
        )
    with ExitStack() as stack:
        for mlp in found:
            forward = Tiles(model, mlp, size)
            stack.enter_context(base_forward_as(mlp, forward))
        yield


def mlps(model: Any) -> list[nn.Module]:
    """The modules that are a block's MLP, and map each token by itself."""
    found = {site.module: None for site in find_sites(model) if site.role == "mlp"}
    return [mlp for mlp in found if features(mlp) is None and _maps_each_token(mlp)]


class Tiles:
    """An MLP's forward, a slice at a time."""

    def __init__(self, model: nn.Module, mlp: nn.Module, size: int) -> None:
        self.model, self.mlp, self.size = model, mlp, size
        self.inner = base_forward(mlp)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not self._is_worth_it(x) or self._by_row():
            return self.inner(x, *args, **kwargs)
        trained = [p for p in self.mlp.parameters() if p.requires_grad]

        def sliced(run: Run, whole: Tensor) -> Tensor:
            flat = whole.flatten(0, 1)[None]  # (1, tokens, width)
            out: Tensor = _Sliced.apply(run, self.size, flat, *trained)  # type: ignore[no-untyped-call]
            return out.view(*whole.shape[:2], -1)

        # a slice runs again in backward as its own forward ran it
        return Remembering(sliced)(self.inner, x)

    def _is_worth_it(self, x: Tensor) -> bool:
        """Whether backward would keep something, of more tokens than a slice has."""
        long = x.dim() == 3 and x[..., 0].numel() > self.size
        return long and torch.is_grad_enabled()

    def _by_row(self) -> bool:
        """Whether an adapter inside needs to see rows as they are."""
        if is_routed(self.model):
            return True
        board = board_of(self.model)
        tunings = () if board is None else board.tunings.values()
        return any(tuning.reads_batch or tuning.shares_notes for tuning in tunings)


class _Sliced(torch.autograd.Function):
    """run(x) slice by slice, which keeps x alone and runs each slice again in backward."""

    @staticmethod
    def forward(ctx: Any, run: Run, size: int, x: Tensor, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.run, ctx.size, ctx.trained = run, size, trained
        ctx.state = random_state(x.device)
        device = x.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)  # fmt: skip
        return torch.cat([run(piece) for piece in torch.split(x, size, 1)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        wants_x = ctx.needs_input_grad[2]
        grad_x = torch.empty_like(x) if wants_x else None
        sums: list[Tensor | None] = [None] * len(ctx.trained)
        device, dtype, enabled = ctx.autocast
        begin = 0
        with drawing_from(ctx.state, x), torch.autocast(device, dtype, enabled):
            for piece, wanted in zip(
                torch.split(x, ctx.size, 1), torch.split(grad, ctx.size, 1), strict=True
            ):
                own = piece.detach().requires_grad_(wants_x)
                with torch.enable_grad():
                    out = ctx.run(own)
                inputs = [own, *ctx.trained] if wants_x else [*ctx.trained]
                found = list(
                    torch.autograd.grad(out, inputs, wanted, allow_unused=True)
                )
                if grad_x is not None:
                    grad_x[:, begin : begin + piece.shape[1]] = found.pop(0)
                begin += piece.shape[1]
                sums = [_plus(total, more) for total, more in zip(sums, found, strict=True)]  # fmt: skip
        return None, None, grad_x, *sums


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total.add_(more)


def _maps_each_token(mlp: Any) -> bool:
    """Whether a module gives a tensor, and the same for tokens together and apart, as a trial shows."""
    inside = [module for _, module in walk(mlp)]
    if any(isinstance(module, nn.ModuleList) for module in inside):
        return False  # experts, which tell each other of their load
    first = next((module for module in inside if features(module)), None)
    if first is None:
        return False
    width, _ = features(first) or (0, 0)
    device = next(mlp.parameters()).device
    x = torch.linspace(-1, 1, 4 * width, device=device).sin().view(1, 4, width)
    with evaluating(mlp):
        try:
            return _is_same_apart(base_forward(mlp), x.to(compute_dtype(first)))
        except Exception:  # it takes something else, or more
            return False


@torch.no_grad()
def _is_same_apart(forward: Run, x: Tensor) -> bool:
    """Whether a map gives the same for the tokens (1, 4, width) together and two by two."""
    whole = forward(x)
    if not isinstance(whole, Tensor) or whole.shape != x.shape:
        return False
    apart = torch.cat([forward(piece) for piece in torch.split(x, 2, 1)], 1)
    largest = float(whole.abs().max())
    return torch.allclose(whole, apart, rtol=1e-2, atol=1e-3 * largest)
