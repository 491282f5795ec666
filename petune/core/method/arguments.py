"""The hyperparameters of a method: the keyword arguments of its `__init__`, with their types."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import filterfalse
from operator import attrgetter
from typing import Annotated, Any

from torch import nn

from petune.core.method.adapter import Adapter
from petune.errors import PetuneError, unknown

PATTERN = "_pattern"
"""The end of an argument that gives another one its values by site."""
NOT_FINITE = ("nan", "inf", "-inf")
"""How Python writes the floats that no weight can be."""
UNION = (typing.Union, types.UnionType)


def arguments(method: type) -> dict[str, inspect.Parameter]:
    """The hyperparameters of a method by name, those of its parents included where it takes
    `**kwargs`.
    """
    found: dict[str, inspect.Parameter] = {}
    for cls in _with_own_init(method):
        hints = typing.get_type_hints(cls.__init__, include_extras=True)
        parameters = inspect.signature(cls.__init__).parameters.values()
        kinds = set(map(attrgetter("kind"), parameters))
        for parameter in filter(_is_hyperparameter, parameters):
            hint = hints.get(parameter.name, Any)
            found.setdefault(parameter.name, parameter.replace(annotation=hint))
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return found


def _is_hyperparameter(parameter: inspect.Parameter) -> bool:
    return parameter.kind is inspect.Parameter.KEYWORD_ONLY


def _with_own_init(method: type) -> Iterator[Any]:
    """The method's class and its parents that have an `__init__` of their own."""
    for cls in filterfalse((nn.Module, object).__contains__, method.__mro__):
        if "__init__" in vars(cls):
            yield cls


def type_name(annotation: Any) -> str:
    """A type as people write it."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return type_name(inner[0])
    if origin in UNION:
        return " | ".join(map(type_name, inner))
    if origin in (list, dict):
        return f"{origin.__name__}[{', '.join(map(type_name, inner))}]"
    if annotation is type(None):
        return "None"
    written = str(annotation).replace("typing.", "")
    return written if inner else getattr(annotation, "__name__", written)


def check_arguments(
    name: str, method: type, given: Mapping[str, Any]
) -> dict[str, Any]:
    """`given`, converted to the types of the signature.

    Raises:
        PetuneError: an argument is unknown, missing, or of the wrong type.
    """
    known = arguments(method)
    by_site = known if issubclass(method, Adapter) else {}
    wanted = partial(_type_of, name, known, by_site)
    checked = {key: _checked(name, key, given[key], wanted(key)) for key in given}
    for key in known.keys() - given.keys():
        parameter = known[key]
        if parameter.default is parameter.empty:
            what = f"{key!r} ({type_name(parameter.annotation)})"
            raise PetuneError(f"method {name!r} needs the argument {what}.")
    return checked


def _type_of(
    method: str,
    known: Mapping[str, inspect.Parameter],
    by_site: Mapping[str, inspect.Parameter],
    key: str,
) -> Any:
    """The type of an argument; of one that ends in `_pattern` a mapping to the type of the
    argument that it gives its values.
    """
    if key in known:
        return known[key].annotation
    plain = key.removesuffix(PATTERN)
    if plain not in by_site:
        raise PetuneError(unknown(f"argument of method {method!r}:", key, known))
    return dict[str, known[plain].annotation] | None  # type: ignore[misc]


def _checked(method: str, key: str, value: Any, kind: Any) -> Any:
    """The value as the type has it."""
    # a second to import, and only needed here
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value)
    except (
        PydanticSchemaGenerationError
    ):  # pydantic does not know it: the method checks
        return value
    except ValidationError as bad:
        why = f"{bad.errors()[0]['msg']} (wanted: {type_name(kind)})"
        raise PetuneError(f"method {method!r}: {key}={value!r}: {why}.") from None


def check_finite(values: Mapping[str, Any], before: str) -> None:
    """See that none of these values, or of those in mappings among them, is NaN or infinite.

    Args:
        before: what a message says before the value's name.

    Raises:
        PetuneError: one is; the message names it.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            check_finite(value, f"{before}{name}.")
        elif repr(value) in NOT_FINITE:
            raise PetuneError(f"{before}{name}: {value} should be a finite number.")
