"""What a tuning consists of: one method, or several that act as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from petune.core.method.arguments import check_arguments
from petune.core.registry.methods import Method, resolve
from petune.errors import PetuneError, unknown

Where = str | Mapping[str, str | None] | None


@dataclass(frozen=True)
class Part:
    """One method of a tuning: its name and class, its arguments, and the sites that the user picked for it."""

    name: str
    cls: Method
    arguments: dict[str, Any]
    where: str | None


def parts(
    method: str | Method | Sequence[str | Method],
    arguments: Mapping[str, Any],
    where: Where = None,
) -> tuple[Part, ...]:
    """The parts of a tuning. With a list of methods, `arguments` and `where` go by the methods' names.

    Raises:
        PetuneError: an unknown method or argument, one of the wrong type, or a method listed twice.
    """
    if isinstance(method, str) or not isinstance(method, Sequence):
        if isinstance(where, Mapping):
            raise PetuneError(f"where={where!r}: a string, as there is one method.")
        name, cls = resolve(method)
        return (Part(name, cls, check_arguments(name, cls, arguments), where),)
    found = dict(resolve(one) for one in method)
    if not found or len(found) < len(method):
        raise PetuneError(
            f"method={list(method)!r}: list each method once, and at least one."
        )
    if isinstance(where, str):
        raise PetuneError(
            f"where={where!r}: with several methods, where={{{next(iter(found))!r}: …}}."
        )
    for what, given in (("arguments go", arguments), ("where goes", where or {})):
        for name in given:
            if name not in found:
                raise PetuneError(
                    unknown(f"method ({what} by method in a list)", name, found)
                )
    for name, own in arguments.items():
        if not isinstance(own, Mapping):
            raise PetuneError(
                f"with several methods, arguments go by method: {name}={{argument: value}}, not {own!r}."
            )
    return tuple(
        Part(
            name,
            cls,
            check_arguments(name, cls, arguments.get(name, {})),
            (where or {}).get(name),
        )
        for name, cls in found.items()
    )
