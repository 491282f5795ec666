"""The installed methods by name."""

from __future__ import annotations

from petune.core.method.adapter import Adapter, Unfreeze
from petune.core.registry.plugins import registry
from petune.errors import PetuneError

Method = type[Adapter] | type[Unfreeze]


def methods() -> dict[str, Method]:
    """Every installed method by name."""
    return registry().all("petune_methods")


def method_of(method: str | Method) -> tuple[str, Method]:
    """(name, class) of a registered name, or of a class, which need not be registered.

    Raises:
        PetuneError: no such name, or no method class.
    """
    if isinstance(method, str):
        return method, registry().get("petune_methods", method)
    if not isinstance(method, type) or not issubclass(method, Adapter | Unfreeze):
        wanted = "a method's name nor a class of petune.Adapter or petune.Unfreeze"
        raise PetuneError(f"{method!r} is neither {wanted}.")
    return name_of(method), method


def name_of(cls: Method) -> str:
    """The name by which a class is registered, else its own."""
    names = {known: name for name, known in methods().items()}
    return names.get(cls, cls.__qualname__)
