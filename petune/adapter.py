"""What a method is: an `Adapter` around one computation of the frozen model, or an `Unfreeze` of parts of it."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Gt
from torch import Tensor, nn

from petune.errors import PetuneError, unknown

if TYPE_CHECKING:
    from petune.formats.twin import PeftTwin
    from petune.site import Site

Inner = Callable[..., Tensor]
Positive = Annotated[int, Gt(0)]
"""The type of a rank, a width, a number of tokens: an argument that is not is refused by name."""


class Adapter(nn.Module):
    """Stands around one computation of the frozen model.

    A method subclasses this. The keyword arguments of `__init__` are its hyperparameters: the saved JSON, the
    command line and the validation of recipes all come from that signature. `forward` states the equation; what
    it gets depends on the kind of site:

    * linear, block: `forward(inner, x)`, x and the result (batch, length, features)
    * attention: `forward(inner, q, k, v, mask)`, q (batch, heads, length, head_dim), k and v with the number of
      key/value heads; mask is None or broadcastable to (batch, heads, queries, keys). The result is
      (batch, length, heads, head_dim). Keys that `forward` puts on the left of k are visible to every query:
      `inner` extends the mask and the position bias itself.
    * embedding: `forward(inner, ids)`, ids (batch, length)
    * prompt: `forward()`, the result (length, hidden); the class has an attribute `length`

    `inner` is the frozen computation and whatever is stacked inside it. A `forward` with a keyword `batch` also gets
    the `Batch` that the model was called with.
    """

    where: ClassVar[str] = ""
    """Roles at which the method acts if the user names none, separated by spaces."""
    mergeable: ClassVar[bool] = False
    """The adapted layer is an affine map of its input (a norm: scaled and shifted), so it can be folded in."""
    peft: ClassVar[PeftTwin | None] = None
    """How PEFT names the same method, for its folder format."""
    starts_at_base: ClassVar[bool] = True
    """A fresh adapter changes nothing; a prompt or a prefix does."""

    def plain(self) -> Mapping[str, Tensor]:
        """The tensors that say what the adapter computes, without what only helps to train it: what is exported."""
        return self.state_dict(keep_vars=True)

    @classmethod
    def settle(cls, sites: Sequence[Site], arguments: dict[str, Any]) -> dict[str, Any]:
        """What the arguments given come to on the sites picked, once for all, before any adapter is made. The result
        is what is saved: it must do without files that are not part of the tuning.
        """
        return arguments

    @classmethod
    @contextmanager
    def step(cls, adapters: Sequence[Any], step: int, total: int) -> Iterator[None]:
        """For a method with a schedule. Stands around each step of the optimizer with all adapters of a tuning, the
        gradients there: what precedes the `yield` can change them, what follows it sees the updated parameters.

        Args:
            step: which one, from 0 to total - 1.
        """
        yield

    def learning_rates(self) -> Mapping[str, float]:
        """How many times the learning rate a parameter learns at, by its name; once for those left out."""
        return {}


class Unfreeze:
    """A method that adds nothing and trains parameters of the base.

    The base keeps its own values: what trains is a float32 copy beside them, so that the tuning can be switched,
    saved and detached like any other, also where the base is quantized.
    """

    mergeable: ClassVar[bool] = True
    where: ClassVar[str] = "parameters"

    def modules(self, sites: list[Site]) -> Iterable[str]:
        """Names of the modules that train, with all that is inside them; "" is the whole model."""
        raise NotImplementedError


class TrainedCopy(Adapter):
    """A float32 copy of a base module that takes its place: a new task's head, or a layer that `Unfreeze` picked."""

    mergeable = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inner: Inner, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class TrainedParameters(TrainedCopy):
    """Float32 copies of all the parameters in a module that holds some itself, for which it reads those of its
    submodules too: they take the places of the base's while it runs.

    Args:
        owners: The modules of the base in it, itself included, by name; each with floating-point parameters.
    """

    def __init__(self, owners: Mapping[str, nn.Module]) -> None:
        super().__init__(nn.ParameterDict())
        copies: Any = self.module
        self.places: dict[str, tuple[nn.Module, str]] = {}  # in a dict: the base's modules are no part of the adapter
        for path, owner in owners.items():
            for name, p in owner.named_parameters(recurse=False):
                key = f"{path}.{name}".lstrip(".").replace(".", "/")
                copies[key] = nn.Parameter(p.detach().clone())
                self.places[key] = owner, name

    def forward(self, inner: Inner, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        before: dict[str, Any] = {key: owner._parameters[name] for key, (owner, name) in self.places.items()}
        copies: Any = self.module
        try:
            for key, (owner, name) in self.places.items():
                owner._parameters[name] = copies[key].to(before[key].dtype)
            return inner(x)
        finally:
            for key, (owner, name) in self.places.items():
                owner._parameters[name] = before[key]

    def write(self) -> None:
        """Put the values into the base."""
        copies: Any = self.module
        for key, (owner, name) in self.places.items():
            dtype = owner.get_parameter(name).dtype
            owner._parameters[name] = nn.Parameter(copies[key].detach().to(dtype), requires_grad=False)


def arguments(method: type) -> dict[str, inspect.Parameter]:
    """The hyperparameters of a method by name, those of its parents included where it takes `**kwargs`."""
    found: dict[str, inspect.Parameter] = {}
    cls: Any
    for cls in method.__mro__:
        if "__init__" not in vars(cls) or cls in (nn.Module, object):
            continue
        hints = typing.get_type_hints(cls.__init__, include_extras=True)
        parameters = inspect.signature(cls.__init__).parameters.values()
        for p in parameters:
            if p.kind is p.KEYWORD_ONLY and p.name not in found:
                found[p.name] = p.replace(annotation=hints.get(p.name, Any))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def type_name(annotation: Any) -> str:
    """A type as people write it."""
    if typing.get_origin(annotation) is Annotated:
        return type_name(typing.get_args(annotation)[0])
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join("None" if part is type(None) else type_name(part) for part in parts)
    if typing.get_origin(annotation) in (list, dict):
        return f"{typing.get_origin(annotation).__name__}[{', '.join(map(type_name, parts))}]"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def check_arguments(name: str, method: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, converted to the types of the signature.

    Raises:
        PetuneError: an argument is unknown, missing or of the wrong type.
    """
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

    known = arguments(method)
    checked: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            raise PetuneError(unknown(f"argument of method {name!r}:", key, known))
        try:
            checked[key] = TypeAdapter(known[key].annotation).validate_python(value)
        except PydanticSchemaGenerationError:  # a type that pydantic does not know: the method checks it
            checked[key] = value
        except ValidationError as bad:
            kind = known[key].annotation
            want = type_name(kind)
            raise PetuneError(f"method {name!r}: {key}={value!r}: {bad.errors()[0]['msg']} (wanted: {want}).") from None
    for key, p in known.items():
        if p.default is p.empty and key not in given:
            raise PetuneError(f"method {name!r} needs the argument {key!r} ({type_name(p.annotation)}).")
    return checked
