"""The conformance kit: does a method, ours or a stranger's, hold what users rely on?"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from petune.core.attached.parts import parts
from petune.core.registry.methods import Method
from petune.errors import PetuneError, UnsupportedError, unknown
from petune.testing.behaviours import BEHAVIOURS, generates_cached
from petune.testing.case import Case
from petune.testing.models import FAMILIES, tiny_batch, tiny_model

__all__ = [
    "BEHAVIOURS",
    "FAMILIES",
    "Case",
    "Row",
    "check_method",
    "reasons",
    "run_checks",
    "tiny_batch",
    "tiny_model",
]

HOLDS, FAILS, REFUSED = "✓✗–"


@dataclass(frozen=True)
class Row:
    """One behaviour on one family at one precision: it holds, fails with an error, or is refused for a reason."""

    behaviour: str
    family: str
    precision: str
    error: str | None = None
    refused: str | None = None

    @property
    def mark(self) -> str:
        """How tables show it."""
        return FAILS if self.error else REFUSED if self.refused else HOLDS


def run_checks(
    method: str | Method | Sequence[str | Method],
    *,
    families: Sequence[str] = ("llama", "gpt2", "bert", "t5"),
    precisions: Sequence[str] = ("fp32",),
    device: str = "cpu",
    **arguments: Any,
) -> Iterator[Row]:
    """Run every behaviour, each on models of its own; a failure does not stop the others. (An encoder has no
    generation to check.)

    Args:
        method: a name or a class; a list of them is checked as one tuning, its arguments go by the methods' names.

    Raises:
        PetuneError: an unknown method, or arguments that it does not take.
    """
    parts(method, arguments)
    for family in families:
        if family not in FAMILIES:
            raise PetuneError(unknown("family", family, FAMILIES))
        for precision in precisions:
            tiny_model(
                family, precision
            )  # an unknown precision is the caller's mistake, not the method's
            case = Case(method, family, precision, arguments, device)
            for behaviour, check in BEHAVIOURS.items():
                if case.generates or check is not generates_cached:
                    yield _checked(case, behaviour)


def _checked(case: Case, behaviour: str) -> Row:
    error = refused = None
    try:
        BEHAVIOURS[behaviour](case)
    except UnsupportedError as reason:
        refused = str(reason)
        if not any(_is_stated(refused, cls) for cls in case.classes):
            error = f"refused, and the docstring does not say so: {reason}"
    except Exception as failure:
        error = (
            f"{type(failure).__name__}: {failure}"
            if str(failure)
            else type(failure).__name__
        )
    return Row(behaviour, case.family, case.precision, error, refused)


def _is_stated(reason: str, cls: Method) -> bool:
    """A user who reads the docstring is told: it has two of the words that the reason is made of."""
    said, given = (
        set(re.findall(r"[a-z]{4,}", text.lower()))
        for text in (inspect.getdoc(cls) or "", reason)
    )
    return (
        len(said & given - set(re.findall(r"[a-z]+", reason.partition(":")[0].lower())))
        > 1
    )


def reasons(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """What does not hold, a line each, and the rows that it is about: `bert, t5: routing: <why>`."""
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.error or row.refused:
            alike.setdefault(
                (row.family, " ".join((row.error or row.refused or "").split())), []
            ).append(row)
    found: dict[tuple[str, str], list[Row]] = {}
    for (family, why), mine in alike.items():
        every = {row.behaviour for row in rows if row.family == family}
        some = list(dict.fromkeys(row.behaviour for row in mine))
        found.setdefault(
            ("everything" if set(some) == every else ", ".join(some), why), []
        ).extend(mine)
    return {
        f"{', '.join(dict.fromkeys(row.family for row in mine))}: {what}: {why}": mine
        for (what, why), mine in found.items()
    }


def check_method(method: str | Method | Sequence[str | Method], **options: Any) -> None:
    """`run_checks`, for a test of your own plugin.

    Raises:
        AssertionError: a behaviour does not hold; the message lists all that don't.
    """
    failed = [row for row in run_checks(method, **options) if row.error]
    lines = [
        f"{row.behaviour} ({row.family}, {row.precision}): {row.error}"
        for row in failed
    ]
    assert not failed, f"{method!r} fails {len(failed)} checks:\n" + "\n".join(lines)
