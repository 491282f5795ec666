"""What a tuning consists of: one method, or several that act as one."""

from __future__ import annotations

from petune.core.method.adapter import Adapter, Unfreeze
from petune.core.registry.plugins import registry
from petune.errors import PetuneError

Method = type[Adapter] | type[Unfreeze]


def methods() -> dict[str, Method]:
    """Every installed method by name."""
    return registry().all("petune_methods")


def resolve(method: str | Method) -> tuple[str, Method]:
    """(name, class) of a registered name, or of a class, which need not be registered.

    Raises:
        PetuneError: no such name, or no method class.
    """
    if isinstance(method, str):
        return method, registry().get("petune_methods", method)
    if not isinstance(method, type) or not issubclass(method, Adapter | Unfreeze):
        raise PetuneError(
            f"{method!r} is neither a method's name nor a class of petune.Adapter or petune.Unfreeze."
        )
    name = next((n for n, c in methods().items() if c is method), method.__qualname__)
    return name, method
