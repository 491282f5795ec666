"""One computation of the frozen model that adapters stand around, for a whole batch or some of its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from petune.core.forward.forward_pass import ForwardPass
from petune.core.forward.link import Call, Link
from petune.core.forward.plan import Index
from petune.core.method.batch import Batch
from petune.errors import UnsupportedError

Inputs = tuple[Any, ...]


class Computation:
    """What adapters stand around: a map from its inputs, of which the first is a tensor, to a tensor.

    Args:
        forward: the forward of the model that it is part of.
        inputs: what the innermost adapter's `inner` is called with unless an adapter changes it.
        index: the rows of the batch that it is for, None for all.
    """

    def __init__(
        self, forward: ForwardPass, inputs: Inputs, index: Index | None = None
    ) -> None:
        self.forward, self.inputs, self.index = forward, inputs, index

    def __call__(self, *inputs: Any) -> Tensor:
        raise NotImplementedError

    def rows(self, index: Index) -> Computation:
        """The same for some rows of the batch."""
        raise NotImplementedError

    @property
    def counts(self) -> list[int]:
        """Of stacked experts, how many rows of the input are each one's, in their order."""
        raise NotImplementedError

    def taken(self, value: Tensor) -> Tensor:
        """Of a tensor with an entry for each row of the batch those that this is for."""
        return value if self.index is None else value[self.index]

    def batch(self, link: Link) -> Batch:
        """What the adapter of a link may know of the batch.

        Raises:
            UnsupportedError: a part of the model was called by itself, so that nothing is known of its batch.
        """
        found = self.forward.batches.get(link.stack)
        if found is None:
            raise UnsupportedError(
                f"{link.tuning.method!r} acts by position: call the model itself, with its "
                f"{link.stack}'s input, not {link.site.name}."
            )
        return found if self.index is None else found.rows(self.index)

    def input_at(self, entry: nn.Module) -> Tensor:
        """The input of the module at which a site begins."""
        seen = self.forward.inputs.get(entry)
        assert seen is not None, (
            f"{type(entry).__name__} did not run, where a site begins"
        )
        return self.taken(seen)


class ModuleForward(Computation):
    """One forward of a module as a map from tensor to tensor; other arguments and results pass it by.

    Args:
        base: the frozen module's forward.
        first: the name of its first argument, in case that it is given by name.
    """

    def __init__(
        self,
        forward: ForwardPass,
        base: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        first: str,
    ) -> None:
        super().__init__(forward, (args[0] if args else kwargs.pop(first),))
        self.base, self.args, self.kwargs = base, args[1:], kwargs
        self.rest: tuple[Any, ...] | list[Any] | None = None

    def __call__(self, x: Tensor, *_: Any) -> Tensor:
        out = self.base(x, *self.args, **self.kwargs)
        if isinstance(out, tuple | list):
            self.rest = out[1:]
            return out[0]
        return out

    @property
    def depends_on_x_alone(self) -> bool:
        """Whether the result can be computed for some of the rows: no other tensor goes in."""
        others = (*self.args, *self.kwargs.values())
        plain = (bool, int, float, str, type(None))
        return all(isinstance(value, plain) for value in others)

    def finish(self, out: Tensor) -> Any:
        """What the module gives where its tensor is `out`."""
        return out if self.rest is None else type(self.rest)([out, *self.rest])

    def rows(self, index: Index) -> SharedRows:
        return SharedRows(self, index, Whole(self))

    def groups(self, indices: list[Index]) -> list[SharedRows]:
        """The computation for each of several groups of rows, which share one run of the base."""
        whole = Whole(self)
        return [SharedRows(self, index, whole) for index in indices]


class Whole:
    """The base's result for a whole batch, computed when it is first asked for."""

    def __init__(self, computation: ModuleForward) -> None:
        self.computation = computation
        self.result: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.result is None:
            self.result = self.computation(*self.computation.inputs)
        return self.result


class SharedRows(Computation):
    """Some rows of a module's forward. The base runs once for all groups that leave its input as it is."""

    def __init__(self, all_rows: ModuleForward, index: Index, whole: Whole) -> None:
        (x,) = all_rows.inputs
        super().__init__(all_rows.forward, (x[index],), index)
        self.all_rows, self.whole = all_rows, whole

    def __call__(self, x: Tensor, *_: Any) -> Tensor:
        if x is self.inputs[0]:
            return self.taken(self.whole())
        if not self.all_rows.depends_on_x_alone:
            raise UnsupportedError(
                "route(): a method that changes the input of a block can't be routed."
            )
        return self.all_rows(x)

    def base(self) -> Tensor:
        """The base's own result, for these rows alone where no group needs the others'."""
        if self.whole.result is None and self.all_rows.depends_on_x_alone:
            return self.all_rows(*self.inputs)
        return self(*self.inputs)


def once(
    inner: Callable[..., Tensor], *inputs: Any
) -> tuple[Tensor, Callable[..., Tensor]]:
    """The result of `inner` for some inputs, and a map that is `inner` but computes nothing anew for the same ones."""
    result = inner(*inputs)

    def again(*given: Any) -> Tensor:
        same = all(one is other for one, other in zip(given, inputs, strict=True))
        return result if same else inner(*given)

    return result, again
