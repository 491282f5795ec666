"""One forward under watch: where its tensors come from, and what of them backward keeps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from petune.training.host_operations import base_of, version_of, written
from petune.training.recompute.operations import Kind, draws, is_short, kind_of
from petune.training.recompute.plan import kept_instead
from petune.training.recompute.random import random_state
from petune.training.recompute.sources import (
    Blank,
    Changed,
    Computed,
    Drawn,
    Found,
    Kept,
    Source,
    View,
)

LEAST = 1 << 14
"""Smaller tensors, in bytes, are kept as they are: to compute them again would take longer than it spares."""

PLAIN = (Tensor, nn.Parameter, nn.Buffer)


@contextmanager
def watched(least: int | None = None) -> Iterator[None]:
    """Within the context a forward keeps for backward what it can't compute again at next to no cost.

    Where backward needs a tensor that an operation which only passes over its elements has made (an activation, a
    norm, a sum, a copy, a dropout, a softmax), what it was made from is kept instead, if that is kept anyway or is
    smaller. Values, gradients and random numbers stay what they are to the last bit.

    Args:
        least: the bytes of a tensor below which it is kept as it is; `LEAST` unless given.
    """
    forward = Watch(LEAST if least is None else least)
    hooks = torch.autograd.graph.saved_tensors_hooks(forward.pack, unpack)
    with hooks, forward:
        yield


class Again:
    """What backward unpacks.

    Args:
        source: where the tensor comes from.
        kept: what must live as long, so that it can be had.
    """

    __slots__ = ("kept", "source", "view")

    def __init__(self, source: Source, kept: list[Kept], view: View | None) -> None:
        self.source, self.kept, self.view = source, kept, view
        source.packed += 1

    def value(self) -> Tensor:
        """The tensor as it was in forward."""
        found = self.source if self.view is None else self.view
        value = found.value()
        self.source.taken()
        return value


@contextmanager
def _as_computed() -> Iterator[None]:
    """Without autocast, whose casts were noted as operations of their own."""
    with ExitStack() as stack:
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def unpack(packed: Any) -> Any:
    """A tensor that `Watch.pack` has packed."""
    if isinstance(packed, Kept):
        return packed.value()
    if not isinstance(packed, Again):
        return packed
    with torch.no_grad(), _as_computed():
        return packed.value()


Args = tuple[Any, ...]
Options = dict[str, Any]
Note = Callable[["Watch", Any, Args, Options], Any]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes where the tensors of a forward come from."""

    def __init__(self, least: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.least = least
        self.noted: dict[int, tuple[weakref.ref[Tensor], Source]] = {}

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        # without gradients nothing is kept
        note = note_of(operation) if torch.is_grad_enabled() else None
        if note is None or types:
            return operation(*args, **options)
        return note(self, operation, args, options)

    def cheap(self, operation: Any, args: Args, options: Options) -> Any:
        """An operation that can run again."""
        state = random_state(_device_of(args)) if draws(operation) else None
        out = operation(*args, **options)
        sources = [self._source_of(arg) for arg in args]
        if isinstance(out, Tensor):
            self.note(out, Computed(out, operation, sources, options, state))
            return out
        for i, one in enumerate(out):
            self.note(one, Computed(one, operation, sources, options, state, i))
        return out

    def product(self, operation: Any, args: Args, options: Options) -> Any:
        """A matrix product."""
        if is_short(operation, args):
            return self.cheap(operation, args, options)
        return operation(*args, **options)

    def blank(self, operation: Any, args: Args, options: Options) -> Any:
        """Memory that is taken."""
        out = operation(*args, **options)
        self.note(out, Blank(out))
        return out

    def drawing(self, operation: Any, args: Args, options: Options) -> Any:
        """Zeros and ones that are drawn into a tensor."""
        self.changing(operation, args, options)
        tensor = args[0]
        if tensor.device.type == "cpu" and is_dense(tensor):
            self.note(tensor, Drawn(tensor))
        return tensor

    def writing(self, operation: Any, args: Args, options: Options) -> Any:
        """A tensor that is changed element by element."""
        tensor = args[0]
        if base_of(tensor) is not None:
            return self.changing(operation, args, options)
        changed = Changed(tensor, operation, [*map(self._source_of, args)], options)
        out = self.changing(operation, args, options)
        self.note(tensor, changed)
        return out

    def changing(self, operation: Any, args: Args, options: Options) -> Any:
        """Tensors that are changed. Where backward counts on one of them as it was, it counts on a copy."""
        for tensor in written(operation, args, options):
            source = self.source(tensor)
            kept = (source.base if isinstance(source, View) else source).kept()
            if kept is not None:
                kept.copy()
        return operation(*args, **options)

    def _source_of(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return self.source(arg)
        return [*map(self._source_of, arg)] if isinstance(arg, list) else arg

    def source(self, tensor: Tensor) -> Source:
        """Where a tensor comes from."""
        source = self._noted(tensor)
        if source is not None and source.version == version_of(tensor):
            return source
        base = base_of(tensor)
        if base is not None and _has_the_elements_of(base, tensor):
            return View(tensor, self.source(base))
        return self.note(tensor, Found(tensor))

    def _noted(self, tensor: Tensor) -> Source | None:
        ref, source = self.noted.get(id(tensor), NOTHING)
        # another tensor may have got the number of one that has gone
        return source if ref() is tensor else None

    def note(self, tensor: Tensor, source: Source) -> Source:
        """Remember where a tensor comes from, as long as it lives."""
        self.noted[id(tensor)] = weakref.ref(tensor), source
        return source

    def pack(self, tensor: Tensor) -> Any:
        """What is kept in place of a tensor that backward needs."""
        if type(tensor) is nn.Parameter:
            return Kept(tensor)
        if type(tensor) not in PLAIN:
            return tensor
        view = self.source(tensor)
        source = view.base if isinstance(view, View) else view
        whole = base_of(tensor) if isinstance(view, View) else tensor
        kept = source.kept()
        if kept is not None:
            instead = [kept]
        else:
            assert whole is not None
            cheaper = kept_instead(source) if source.size >= self.least else None
            instead = [source.keep(whole)] if cheaper is None else cheaper
        return Again(source, instead, view if isinstance(view, View) else None)


NOTHING: tuple[Any, None] = (lambda: None, None)

NOTES: dict[Kind, Note] = {
    Kind.CHEAP: Watch.cheap,
    Kind.PRODUCT: Watch.product,
    Kind.BLANK: Watch.blank,
    Kind.DRAWING: Watch.drawing,
    Kind.WRITING: Watch.writing,
    Kind.CHANGING: Watch.changing,
}
"""What is done at an operation; nothing at a view, and at one of which nothing is known."""


@cache
def note_of(operation: Any) -> Note | None:
    """What is done at an operation."""
    return NOTES.get(kind_of(operation))


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill its memory, in any order."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def _has_the_elements_of(base: Tensor, view: Tensor) -> bool:
    """Whether a view's elements are its base's as they are: not their real parts, nor conjugated or negated."""
    return view.dtype is base.dtype and not view.is_conj() and not view.is_neg()


def _device_of(args: Args) -> torch.device:
    return next(arg.device for arg in args if isinstance(arg, Tensor))
