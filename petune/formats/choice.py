"""Which method of petune's is which of PEFT's, in both directions; a method says so itself in its `PeftTwin`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune.core.method.twin import PeftTwin
from petune.core.registry.methods import methods
from petune.errors import UnsupportedError, listed
from petune.formats.advice import MERGE_THERE, instead
from petune.formats.names import CONFIG

if TYPE_CHECKING:
    from petune.core.attached.parts import Part
    from petune.core.attached.tuning import Tuning

Twins = dict[str, PeftTwin]
"""Methods by name, each with how PEFT names it."""
OFF: tuple[Any, ...] = (None, "none", [], {})
"""The values with which an option of PEFT's asks for nothing."""


def twin_of(tuning: Tuning) -> PeftTwin:
    """How PEFT names the method of a tuning.

    Raises:
        UnsupportedError: PEFT has no such method, or the tuning consists of several.
    """
    (_, twin), *others = twins_of(tuning)
    if others:
        raise UnsupportedError(
            "serving engines read low-rank updates alone, not a tuning of several methods; "
            f"{instead(tuning.parts)}."
        )
    return twin


def twins_of(tuning: Tuning) -> list[tuple[Part, PeftTwin]]:
    """The methods of a tuning, each with how PEFT names it: the one that PEFT's type is, then those that it has as
    options of that.

    Raises:
        UnsupportedError: PEFT has no such method, or has none that holds all of them.
    """
    found = [(part, _own_twin(part.cls)) for part in tuning.parts]
    paired = [(part, twin) for part, twin in found if twin is not None]
    for part, twin in found:
        if twin is None or (not twin.kind and len(found) == 1):
            raise UnsupportedError(
                f"PEFT's format has no {part.name!r}; {instead([part])}."
            )
    return paired if len(paired) == 1 else _main_first(tuning, paired)


def _main_first(
    tuning: Tuning, paired: list[tuple[Part, PeftTwin]]
) -> list[tuple[Part, PeftTwin]]:
    """The one method that PEFT's type is, then those that it has as options of that."""
    mains = [pair for pair in paired if not pair[1].beside]
    rest = [pair for pair in paired if pair[1].beside]
    if len(mains) != 1 or not {t.beside for _, t in rest} <= mains[0][1].neutral.keys():
        raise UnsupportedError(
            f"PEFT's format has no place for a tuning of {tuning.method}; save without format=."
        )
    return mains + rest


def twins_for(config: Mapping[str, Any], folder: Path) -> Twins:
    """The methods that a configuration of PEFT's asks for: the one that its type is, then those that it has as options.
    A method of petune's own comes before PEFT's code inside petune (`peft:NAME`).

    Raises:
        UnsupportedError: no installed method is this one, or none with these options.
    """
    beside = {n: twin for n, twin in _installed().items() if twin.beside}
    options = {twin.beside for twin in beside.values()}
    name, main = _main_twin(config, folder, options)
    asked = {
        n: twin for n, twin in beside.items() if config.get(twin.beside) not in OFF
    }
    return {name: main} | asked


def _main_twin(
    config: Mapping[str, Any], folder: Path, beside: set[str]
) -> tuple[str, PeftTwin]:
    """(name, twin) of the method that PEFT's type is.

    Args:
        beside: the options that other methods serve.
    """
    kind = config.get("peft_type")
    refusals = []
    for name, twin in _candidates(kind).items():
        option = _foreign_option(config, twin, beside)
        if option is None:
            return name, twin
        why = twin.reasons.get(option, f"it computes something else; {MERGE_THERE}")
        refusals.append(f"{option}={config[option]!r}: {why}.")
    said = f"{folder / CONFIG}: no method here is PEFT's {kind}"
    if refusals:
        raise UnsupportedError(f"{said} with {refusals[0]}")
    raise UnsupportedError(f"{said}. Known: {listed(_known_kinds())}.")


def _candidates(kind: Any) -> Twins:
    """The methods of this kind of PEFT's, if possible those that are petune's own."""
    same_kind = {
        name: twin
        for name, twin in _installed().items()
        if kind in _kinds(twin) and twin.tensors != {}
    }
    own = {name: twin for name, twin in same_kind.items() if twin.tensors is not None}
    return own or same_kind


def _known_kinds() -> list[str]:
    """Some of the kinds that can be loaded."""
    found: set[str] = set()
    for twin in _installed().values():
        if twin.tensors:
            found.update(_kinds(twin))
    named = sorted(found)
    return [*named[:4], "…"] if len(named) > 4 else named


def _own_twin(method: type) -> PeftTwin | None:
    """The twin in the class's own body: what inherits from a method is another method."""
    twin = vars(method).get("peft")
    return twin if isinstance(twin, PeftTwin) else None


def _installed() -> Twins:
    """The twins of the installed methods."""
    found = {name: _own_twin(method) for name, method in methods().items()}
    return {name: twin for name, twin in found.items() if twin is not None}


def _kinds(twin: PeftTwin) -> set[str]:
    return {twin.kind, *twin.also} - {""}


def _foreign_option(
    config: Mapping[str, Any], twin: PeftTwin, beside: set[str]
) -> str | None:
    """The first option of PEFT's that has a value with which it is another method than ours."""
    for option, allowed in twin.neutral.items():
        if option not in beside and config.get(option, allowed[0]) not in allowed:
            return option
    if twin.tensors is None:  # PEFT's own layers compute it
        return None
    known = {*twin.neutral, *twin.arguments}
    asked = (option for option in config if option.startswith("use_"))
    return next(
        (key for key in asked if config[key] is True and key not in known), None
    )
