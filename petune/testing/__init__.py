"""The conformance kit: does a method, ours or a stranger's, hold what users rely on?"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from petune.core.attached.parts import parts
from petune.core.registry.methods import Method
from petune.errors import PetuneError, UnsupportedError, unknown
from petune.testing.behaviours import BEHAVIOURS
from petune.testing.case import Case
from petune.testing.generation import generates_cached
from petune.testing.models import FAMILIES, tiny_batch, tiny_model
from petune.testing.rows import Row, reasons

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
            tiny_model(family, precision)  # if it is unknown, the caller is wrong
            case = Case(method, family, precision, arguments, device)
            for behaviour, check in BEHAVIOURS.items():
                if case.generates or check is not generates_cached:
                    yield _checked(case, behaviour)


def _checked(case: Case, behaviour: str) -> Row:
    """The row of one behaviour: it holds unless the check raises."""
    row = Row(behaviour, case.family, case.precision)
    try:
        BEHAVIOURS[behaviour](case)
    except UnsupportedError as reason:
        if any(_is_stated(str(reason), cls) for cls in case.classes):
            return replace(row, refused=str(reason))
        error = f"refused, and the docstring does not say so: {reason}"
        return replace(row, error=error, refused=str(reason))
    except Exception as failure:
        kind = type(failure).__name__
        return replace(row, error=f"{kind}: {failure}" if str(failure) else kind)
    return row


def _is_stated(reason: str, cls: Method) -> bool:
    """Whether a user who reads the docstring is told: it has two of the words that the reason is made of, besides
    those before its colon, which name what is refused.
    """
    said = _long_words(inspect.getdoc(cls) or "")
    subject = set(re.findall(r"[a-z]+", reason.partition(":")[0].lower()))
    shared = (said & _long_words(reason)) - subject
    return len(shared) > 1


def _long_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", text.lower()))


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
