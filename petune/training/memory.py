"""What one training step holds in memory, measured on the step itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from petune.training.host import SEAMS
from petune.training.host_torch import memory_changes, plain_tensors, storage_key


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

    Raises:
        MovedError: torch reports memory in another way than petune knows.
    """
    SEAMS.require()
    with _harmless(optimizer):
        resident = _Storages()
        resident.add(_tensors(model))
        resident.add(_tensors([optimizer.param_groups, dict(optimizer.state)]))
        saved = _Storages(ignored=resident.sizes)
        resident.add(batch)

        def pack(tensor: Tensor) -> Tensor:
            saved.add(plain_tensors(tensor))
            return tensor

        def step() -> None:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        on_cuda = next(model.parameters()).is_cuda
        peak = _peak_on_cuda(step) if on_cuda else resident.total + _peak_on_cpu(step)
    return peak, saved.total


def resident_bytes(model: nn.Module) -> int:
    """The bytes of a model's tensors, what quantized weights carry along included."""
    storages = _Storages()
    storages.add(_tensors(model))
    return storages.total


class _Storages:
    """The sizes in bytes of storages, by a key. All of them must stay alive as long as this is used.

    Args:
        ignored: the keys of storages that are not counted.
    """

    def __init__(self, ignored: Iterable[int] = ()) -> None:
        self.sizes: dict[int, int] = {}
        self.ignored = frozenset(ignored)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of tensors, those that are known already not again."""
        for tensor in tensors:
            key = storage_key(tensor)
            if key not in self.ignored:
                self.sizes[key] = tensor.untyped_storage().nbytes()

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


@contextmanager
def _harmless(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the context the learning rates are 0; there are no gradients before and after."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0
    optimizer.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _peak_on_cuda(step: Callable[[], None]) -> int:
    """The most bytes that were given out at once during a step, those before it included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _peak_on_cpu(step: Callable[[], None]) -> int:
    """The most bytes that were given out at once during a step, beyond those before it."""
    now = peak = 0
    for _, size in memory_changes(step):
        now += size
        peak = max(peak, now)
    return peak


def _tensors(thing: Any) -> Iterator[Tensor]:
    """All tensors in reach: parameters, buffers, gradients, optimizer states, what quantized weights carry along."""
    seen: set[int] = set()
    waiting: list[tuple[Any, bool]] = [(thing, False)]
    while waiting:
        found, inside_tensor = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            inside_tensor = True
            yield from _parts_and_gradient(found)
        # depth first: what a quantized weight holds is met inside it before it is met on its module
        held = reversed(_inside(found, inside_tensor))
        waiting += [(inner, inside_tensor) for inner in held]


def _parts_and_gradient(tensor: Tensor) -> Iterator[Tensor]:
    yield from plain_tensors(tensor)
    if tensor.is_leaf and tensor.grad is not None:
        yield from plain_tensors(tensor.grad)


def _inside(thing: Any, inside_tensor: bool) -> list[Any]:
    """What a thing holds. Of arbitrary objects only those are opened that a tensor carries along."""
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, list | tuple):
        return list(thing)
    if inside_tensor or isinstance(thing, nn.Module):
        return list(getattr(thing, "__dict__", {}).values())
    return []
