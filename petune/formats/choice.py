"""Which method of petune's is which of PEFT's, in both directions; a method says so itself in its `PeftTwin`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune.core.method.twin import PeftTwin
from petune.core.registry.methods import method_of, methods
from petune.errors import UnsupportedError, listed
from petune.formats.advice import instead
from petune.formats.names import CONFIG

if TYPE_CHECKING:
    from petune.core.attached.tuning import Tuning


def twin_of(tuning: Tuning) -> PeftTwin:
    """How PEFT names the method of a tuning.

    Raises:
        UnsupportedError: PEFT has no such method, or the tuning consists of several.
    """
    if len(tuning.parts) > 1:
        raise UnsupportedError(
            "PEFT's format has no place for a tuning of several methods; save without format=."
        )
    _, method = method_of(tuning.method)
    twin = _own_twin(method)
    if twin is None:
        raise UnsupportedError(
            f"PEFT's format has no {tuning.method!r}; {instead(tuning.parts)}."
        )
    return twin


def method_for(config: Mapping[str, Any], folder: Path) -> tuple[str, PeftTwin]:
    """(name, twin) of the method that a configuration of PEFT's asks for. A method of petune's own comes before PEFT's
    code inside petune (`peft:NAME`).

    Raises:
        UnsupportedError: no installed method is this one, or none with these options.
    """
    kind = config.get("peft_type")
    candidates = _candidates(kind)
    refusals = []
    for name, twin in candidates.items():
        option = _foreign_option(config, twin)
        if option is None:
            return name, twin
        refusals.append(f"{option}={config[option]!r}")
    said = f"{folder / CONFIG}: no method here is PEFT's {kind}"
    if refusals:
        raise UnsupportedError(f"{said} with {refusals[0]}.")
    raise UnsupportedError(f"{said}. Known: {listed(_known_kinds())}.")


def _candidates(kind: Any) -> dict[str, PeftTwin]:
    """The methods of this kind of PEFT's, if possible those that are petune's own."""
    same_kind = {
        name: twin for name, twin in _loadable().items() if kind in _kinds(twin)
    }
    own = {name: twin for name, twin in same_kind.items() if twin.tensors is not None}
    return own or same_kind


def _known_kinds() -> list[str]:
    found: set[str] = set()
    for twin in _loadable().values():
        found.update(_kinds(twin))
    return sorted(found)


def _own_twin(method: type) -> PeftTwin | None:
    """The twin in the class's own body: what inherits from a method is another method."""
    twin = vars(method).get("peft")
    return twin if isinstance(twin, PeftTwin) else None


def _loadable() -> dict[str, PeftTwin]:
    """The twins of the installed methods that can be loaded from PEFT's folders."""
    found = {}
    for name, method in methods().items():
        twin = _own_twin(method)
        if twin is not None and twin.tensors != {}:
            found[name] = twin
    return found


def _kinds(twin: PeftTwin) -> tuple[str, ...]:
    return (twin.kind, *twin.also)


def _foreign_option(config: Mapping[str, Any], twin: PeftTwin) -> str | None:
    """The first option of PEFT's that has a value with which it is another method than ours."""
    for option, allowed in twin.neutral.items():
        if config.get(option, allowed[0]) not in allowed:
            return option
    return None
