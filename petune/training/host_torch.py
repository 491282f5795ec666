"""What the training leans on in torch that has no public name, each with a check that it still holds."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from petune.core.host.seam import Seams, installed
from petune.errors import MovedError
from petune.training.bytecode import mentions

SEAMS = Seams()


@SEAMS.lean(
    "torch",
    "UntypedStorage._cdata",
    since="2.0",
    why="count memory once, however many tensors are views of it",
)
def _views_share_a_key() -> bool:
    whole, other = torch.zeros(4), torch.zeros(4)
    of_views = storage_key(whole) == storage_key(whole[1:])
    return of_views and storage_key(whole) != storage_key(other)


def storage_key(tensor: Tensor) -> int:
    """A number that two tensors have in common if they share their memory, as long as one of them lives."""
    # the storage itself as a key would keep the memory, and its address is 0 where it is empty
    return tensor.untyped_storage()._cdata


@SEAMS.lean(
    "torch",
    "Tensor.__tensor_flatten__",
    since="2.1",
    why="find the plain tensors that a quantized weight is made of",
)
def _subclasses_name_their_tensors() -> bool:
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

    members = dict.fromkeys(
        ("__tensor_flatten__", "__tensor_unflatten__"), lambda *_: None
    )
    return is_traceable_wrapper_subclass_type(type("Wrapper", (Tensor,), members))


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor subclass is made of; the tensor itself if it is plain."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    names, _ = flatten()
    for name in names:
        yield from plain_tensors(getattr(tensor, name))


@SEAMS.lean(
    "torch",
    "profile.profiler.kineto_results, whose events have name(), nbytes() and start_ns()",
    since="2.4",
    why="measure the memory of a training step on the CPU",
)
def _profiler_keeps_its_events() -> bool:
    # a trial would end the profile of a user who trains under one
    from torch._C._autograd import _KinetoEvent, _ProfilerResult

    reported = all(
        hasattr(_KinetoEvent, name) for name in ("name", "nbytes", "start_ns")
    )
    kept = mentions(torch.autograd.profiler.profile, "kineto_results")
    held = any(mentions(cls, "profiler") for cls in profile.__mro__)
    return reported and kept and held and hasattr(_ProfilerResult, "events")


MARK = "petune: here"


def mark() -> None:
    """Say to `memory_changes` that another part of what it runs begins."""
    with record_function(MARK):
        pass


def memory_changes(run: Callable[[], None]) -> list[list[int]]:
    """What the CPU's allocator does while `run` runs, in the order of time.

    Returns:
        Bytes, below 0 where memory is given back: a list for each part of the run, between its marks.

    Raises:
        MovedError: the profiler reports no memory at all.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its first use prints otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        run()
    events: Any = watch.profiler.kineto_results.events()
    told = [event for event in events if event.name() in ("[memory]", MARK)]
    parts: list[list[int]] = [[]]
    for event in sorted(told, key=lambda event: event.start_ns()):
        if event.name() == MARK:
            parts.append([])
        else:
            parts[-1].append(event.nbytes())
    if not any(parts):
        raise MovedError(
            f"torch {installed('torch')}: the profiler reports no event named [memory]. petune measures the memory "
            "of a step by them: install a newer petune, or a torch that it was tested with."
        )
    return parts


KEEP_LITTLE = {
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
    "ban_recompute_materialized_backward": False,
    "ban_recompute_reductions": False,
}
"""Functorch's rules of thumb against computing norms and activations again in backward, switched off: on the matrix
products that it keeps in any case, what is between them costs little to compute and much to keep."""
BUDGET = "activation_memory_budget"


@SEAMS.lean(
    "torch",
    f"torch._functorch.config: {', '.join((*KEEP_LITTLE, BUDGET))}",
    since="2.4",
    why="choose what compiled blocks keep for backward",
)
def _functorch_has_its_rules() -> bool:
    from torch._functorch import config

    return all(hasattr(config, key) for key in (*KEEP_LITTLE, BUDGET, "patch"))


@contextmanager
def keeping_little(budget: float | None) -> Iterator[None]:
    """Within the context, what is compiled computes norms and activations again in backward.

    Args:
        budget: the share of what functorch would keep that it may keep, from 0 to 1; None for all of it.
    """
    from torch._functorch import config

    options: dict[str, Any] = dict(KEEP_LITTLE)
    if budget is not None:
        options[BUDGET] = budget
    with config.patch(options):
        yield


@SEAMS.lean(
    "torch",
    "torch._dynamo.config.recompile_limit",
    since="2.6",
    why="compile blocks of several kinds by one piece of code",
)
def _dynamo_has_its_limit() -> bool:
    from torch._dynamo import config

    return hasattr(config, "recompile_limit") and hasattr(config, "patch")


@contextmanager
def recompiling(times: int) -> Iterator[None]:
    """Within the context one piece of code may be compiled so many times before dynamo gives it up."""
    from torch._dynamo import config

    with config.patch(recompile_limit=times):
        yield


@SEAMS.lean(
    "torch",
    "torch._inductor.cpp_builder.get_cpp_compiler() and InvalidCxxCompiler",
    since="2.4",
    why="say before a training begins that compiling it needs a C++ compiler",
)
def _inductor_looks_for_a_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    takes_nothing = not inspect.signature(get_cpp_compiler).parameters
    return takes_nothing and issubclass(InvalidCxxCompiler, Exception)


def has_cpp_compiler() -> bool:
    """Whether torch finds a C++ compiler on this machine."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
