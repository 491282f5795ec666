"""What one training step holds in memory, measured on the step itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def measure_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    batch: Iterable[Tensor] = (),
) -> tuple[int, int]:
    """(peak_memory_bytes, saved_activation_bytes) of one forward, backward and optimizer step.

    The peak is what the allocator reports on CUDA; on the CPU it is the storages of the model, the optimizer and the
    batch and on top of them the most bytes that the allocator gave out at once, compiled code's too. What a kernel
    allocates past the allocator is not seen there. Saved activations are the storages that autograd keeps when the
    forward is over, parameters, buffers and quantized weights left out; each storage counts once.

    The learning rate is 0 in this step, so the parameters stay what they are. Gradients are cleared.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0
    optimizer.zero_grad(set_to_none=True)
    resident = _Storages(_tensors(model))
    resident.add(_tensors([optimizer.param_groups, dict(optimizer.state)]))
    own = set(resident.sizes)
    resident.add(batch)
    saved = _Storages(())
    cuda = next(model.parameters()).is_cuda

    def pack(tensor: Tensor) -> Tensor:
        saved.add(t for t in _parts(tensor) if t.untyped_storage()._cdata not in own)
        return tensor

    def step() -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    try:
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resident.total + _allocated(step)
    finally:
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    return peak, saved.total


def resident_bytes(model: nn.Module) -> int:
    """The bytes of a model's tensors, what quantized weights carry along included."""
    return _Storages(_tensors(model)).total


class _Storages:
    """Storages by identity. Those given are taken to stay alive for as long as this is used."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.sizes: dict[int, int] = {}
        self.add(tensors)

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.sizes[storage._cdata] = storage.nbytes()

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def _allocated(step: Callable[[], None]) -> int:
    """The most bytes that the CPU's allocator has given out at once during a step, beyond those before it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its first use prints otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        step()
    events = watch.profiler.kineto_results.events()
    changes = sorted(
        (e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"
    )
    now = peak = 0
    for _, size in changes:
        now += size
        peak = max(peak, now)
    return peak


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor subclass is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


def _tensors(
    thing: Any, seen: set[int] | None = None, inside_tensor: bool = False
) -> Iterator[Tensor]:
    """All tensors in reach: parameters, buffers, gradients, optimizer states, what quantized weights carry along."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    inner: Iterable[Any] = ()
    if isinstance(thing, Tensor):
        yield from _parts(thing)
        if thing.is_leaf and thing.grad is not None:
            yield from _parts(thing.grad)
        inside_tensor, inner = True, getattr(thing, "__dict__", {}).values()
    elif isinstance(thing, dict):
        inner = thing.values()
    elif isinstance(thing, list | tuple):
        inner = thing
    elif isinstance(thing, nn.Module) or inside_tensor:
        inner = getattr(thing, "__dict__", {}).values()
    for item in list(inner):
        yield from _tensors(item, seen, inside_tensor)
