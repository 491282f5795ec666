"""What one training step holds in memory, measured on the step itself."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from petune.training.host import SEAMS
from petune.training.host_torch import mark, memory_changes, plain_tensors, storage_key

Step = Callable[[Callable[[], None]], None]
"""A training step, which calls what it is given when its forward is over."""


def measure_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    batch: Iterable[Tensor] = (),
) -> tuple[int, int]:
    """(peak_memory_bytes, saved_activation_bytes) of one forward, backward and optimizer step.

    The peak is what the allocator reports on CUDA; on the CPU it is the storages of the model, the optimizer and the
    batch and on top of them the most bytes that the allocator gave out at once, compiled code's too. What a kernel
    allocates past the allocator is not seen there. Saved activations are what the forward was given and has not given
    back when it is over: what autograd keeps, by whatever means.

    The learning rate is 0 in this step, so the parameters stay what they are. Gradients are cleared.

    Raises:
        MovedError: torch reports memory in another way than petune knows.
    """
    SEAMS.require()
    gc.collect()  # what earlier steps have left would be given back within this one
    with _harmless(optimizer):
        resident = _Storages()
        resident.add(_tensors(model))
        resident.add(_tensors([optimizer.param_groups, dict(optimizer.state)]))
        resident.add(batch)

        def step(forward_is_over: Callable[[], None]) -> None:
            value = loss()
            forward_is_over()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        if next(model.parameters()).is_cuda:
            return _on_cuda(step)
        peak, saved = _on_cpu(step)
    return resident.total + peak, saved


def resident_bytes(model: nn.Module) -> int:
    """The bytes of a model's tensors, what quantized weights carry along included."""
    storages = _Storages()
    storages.add(_tensors(model))
    return storages.total


class _Storages:
    """The sizes in bytes of storages, by a key. All of them must stay alive as long as this is used."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of tensors, those that are known already not again."""
        for tensor in tensors:
            self.sizes[storage_key(tensor)] = tensor.untyped_storage().nbytes()

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


def _on_cuda(step: Step) -> tuple[int, int]:
    """(the most bytes that were given out at once, those that the forward had kept)."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    after: list[int] = []
    step(lambda: after.append(torch.cuda.memory_allocated()))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), after[0] - before


def _on_cpu(step: Step) -> tuple[int, int]:
    """(the most bytes that were given out at once, those that the forward had kept), beyond those before the step."""
    forward, rest = memory_changes(lambda: step(mark))
    kept = sum(forward)
    peak = max(accumulate([*forward, *rest], initial=0))
    return peak, kept


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
