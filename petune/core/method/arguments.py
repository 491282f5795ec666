"""What a method is: an `Adapter` around one computation of the frozen model, or an `Unfreeze` of parts of it."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from torch import nn

from petune.errors import PetuneError, unknown

PATTERN = "_pattern"


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
        return " | ".join(
            "None" if part is type(None) else type_name(part) for part in parts
        )
    if typing.get_origin(annotation) in (list, dict):
        return f"{typing.get_origin(annotation).__name__}[{', '.join(map(type_name, parts))}]"
    return (
        annotation.__name__
        if isinstance(annotation, type)
        else str(annotation).replace("typing.", "")
    )


def check_arguments(
    name: str, method: type, given: Mapping[str, Any]
) -> dict[str, Any]:
    """`given`, converted to the types of the signature.

    Raises:
        PetuneError: an argument is unknown, missing or of the wrong type.
    """
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

    known = arguments(method)
    checked: dict[str, Any] = {}
    for key, value in given.items():
        if key.endswith(PATTERN) and key.removesuffix(PATTERN) in known:
            checked[key] = value
            continue
        if key not in known:
            raise PetuneError(unknown(f"argument of method {name!r}:", key, known))
        try:
            checked[key] = TypeAdapter(known[key].annotation).validate_python(value)
        except (
            PydanticSchemaGenerationError
        ):  # a type that pydantic does not know: the method checks it
            checked[key] = value
        except ValidationError as bad:
            kind = known[key].annotation
            want = type_name(kind)
            raise PetuneError(
                f"method {name!r}: {key}={value!r}: {bad.errors()[0]['msg']} (wanted: {want})."
            ) from None
    for key, p in known.items():
        if p.default is p.empty and key not in given:
            raise PetuneError(
                f"method {name!r} needs the argument {key!r} ({type_name(p.annotation)})."
            )
    return checked
