"""What a saved tuning keeps of its methods to stay what it was: every argument, and the plugin that brought each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from petune.core.attached.parts import Part
from petune.core.host.seam import installed
from petune.core.method.arguments import arguments
from petune.core.registry.methods import Method, methods
from petune.core.registry.plugins import registry


def settled(part: Part) -> dict[str, Any]:
    """The arguments of a method with its defaults, in the order of its signature: a plugin may change a default, and
    the tuning must not change with it. A default that JSON can't hold is left to the plugin.
    """
    return {**_defaults(part.cls), **part.arguments}


def brought_by(part: Part) -> str | None:
    """The plugin of a method and its version, such as `lowrank 0.1.0`; None for a class that no plugin brings."""
    if methods().get(part.name) is not part.cls:
        return None
    plugin = registry().plugins[registry().owner("petune_methods", part.name)]
    return f"{plugin.name} {plugin.version}"


def own_version() -> str:
    """That of the petune that runs."""
    return installed("petune")


def differences(
    parts: Sequence[Part], plugins: Mapping[str, str | None], version: str | None
) -> str:
    """How what is installed differs from what a tuning was saved with, in a few words; nothing where it doesn't.

    Args:
        parts: the tuning's methods, with the arguments that were saved. These are what acts, so that no default of
            today's matters but that of an argument which the method did not have then.
        plugins: what brought each method then.
        version: petune's then.
    """
    found = list(chain.from_iterable(_differences(part, plugins) for part in parts))
    if not found and version != own_version():
        return f"it was saved with petune {version}, here is {own_version()}"
    return "; ".join(found)


def _differences(part: Part, plugins: Mapping[str, str | None]) -> Iterator[str]:
    was, here = plugins.get(part.name), brought_by(part)
    if was != here:
        what = f"was saved with plugin {was or 'none'}, here is {here or 'none'}"
        yield f"{part.name!r} {what}"
    for key in _defaults(part.cls).keys() - part.arguments.keys():
        what = f"did not have {key!r} then, here it is {_defaults(part.cls)[key]!r}"
        yield f"{part.name!r} {what}"


def _defaults(method: Method) -> dict[str, Any]:
    """The defaults of a method's arguments that JSON can hold."""
    found = {name: known.default for name, known in arguments(method).items()}
    return dict(filter(_is_json, found.items()))


def _is_json(named: tuple[str, object]) -> bool:
    try:
        json.dumps(named, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
