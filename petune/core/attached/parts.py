"""What a tuning consists of: one method, or several that act as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from petune.core.method.arguments import check_arguments, check_finite
from petune.core.registry.methods import Method, method_of
from petune.errors import PetuneError, unknown

Where = str | Mapping[str, str | None] | None
"""The sites that the user picks; of several methods, by their names."""


@dataclass(frozen=True)
class Part:
    """One method of a tuning: its name and class, its arguments, and the sites that the
    user picked for it.

    Args:
        roles: the method's own choice of sites when the tuning was saved, where that is
            read from a file.
    """

    name: str
    cls: Method
    arguments: dict[str, Any]
    where: str | None
    roles: str | None = None

    @property
    def own_roles(self) -> str:
        """Where the method acts if the user has picked nothing."""
        return self.cls.where if self.roles is None else self.roles


def parts(
    method: str | Method | Sequence[str | Method],
    arguments: Mapping[str, Any],
    where: Where = None,
) -> tuple[Part, ...]:
    """The parts of a tuning. With a list of methods, `arguments` and `where` go by the
    methods' names.

    Raises:
        PetuneError: an unknown method or argument, one of the wrong type, or a method
            listed twice.
    """
    if isinstance(method, Sequence) and not isinstance(method, str):
        return _several(method, arguments, where)
    if isinstance(where, Mapping):
        raise PetuneError(f"where={where!r}: a string, as there is one method.")
    return (_part(*method_of(method), arguments, where),)


def _part(
    name: str, cls: Method, arguments: Mapping[str, Any], where: str | None
) -> Part:
    if not isinstance(where, str | None):
        raise PetuneError(f"where={where!r}: should be one text, such as 'q v'.")
    checked = check_arguments(name, cls, arguments)
    check_finite(checked, f"method {name!r}: ")
    return Part(name, cls, checked, where)


def _several(
    listed: Sequence[str | Method], arguments: Mapping[str, Any], where: Where
) -> tuple[Part, ...]:
    """The parts of a tuning of several methods."""
    found = dict(map(method_of, listed))
    if not found or len(found) < len(listed):
        what = f"method={list(listed)!r}"
        raise PetuneError(f"{what}: list each method once, and at least one.")
    if isinstance(where, str):
        first = next(iter(found))
        remedy = f"with several methods, where={{{first!r}: …}}"
        raise PetuneError(f"where={where!r}: {remedy}.")
    sites: Mapping[str, str | None] = {} if where is None else where
    _check_names("arguments go", arguments, found)
    _check_names("where goes", sites, found)
    for name, own in arguments.items():
        _check_is_mapping(name, own)
    return tuple(
        _part(name, cls, arguments.get(name, {}), sites.get(name))
        for name, cls in found.items()
    )


def _check_names(
    what: str, given: Mapping[str, Any], methods: Mapping[str, Any]
) -> None:
    for name in given:
        if name not in methods:
            kind = f"method ({what} by method in a list)"
            raise PetuneError(unknown(kind, name, methods))


def _check_is_mapping(name: str, own: Any) -> None:
    if not isinstance(own, Mapping):
        how = f"arguments go by method: {name}={{argument: value}}"
        raise PetuneError(f"with several methods, {how}, not {own!r}.")
