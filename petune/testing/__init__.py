"""The conformance kit: does a method, ours or a stranger's, hold what users rely on?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from petune.errors import UnsupportedError
from petune.testing.behaviours import BEHAVIOURS, Case
from petune.testing.models import FAMILIES, tiny_batch, tiny_model
from petune.tuning import Method

__all__ = ["BEHAVIOURS", "FAMILIES", "Case", "Row", "check_method", "run_checks", "tiny_batch", "tiny_model"]


@dataclass(frozen=True)
class Row:
    """One behaviour on one family at one precision: it holds, fails with an error, or is refused for a reason."""

    behaviour: str
    family: str
    precision: str
    error: str | None = None
    refused: str | None = None


def run_checks(
    method: str | Method,
    *,
    families: Sequence[str] = ("llama", "gpt2", "bert", "t5"),
    precisions: Sequence[str] = ("fp32",),
    **arguments: Any,
) -> Iterator[Row]:
    """Run every behaviour, each on models of its own; a failure does not stop the others.

    Raises:
        PetuneError: an unknown method, or arguments that it does not take.
    """
    for family in families:
        for precision in precisions:
            case = Case(method, family, precision, arguments)
            for behaviour, check in BEHAVIOURS.items():
                try:
                    check(case)
                except UnsupportedError as reason:
                    yield Row(behaviour, family, precision, refused=str(reason))
                except Exception as failure:
                    error = f"{type(failure).__name__}: {failure}" if str(failure) else type(failure).__name__
                    yield Row(behaviour, family, precision, error)
                else:
                    yield Row(behaviour, family, precision)


def check_method(method: str | Method, **options: Any) -> None:
    """`run_checks`, for a test of your own plugin.

    Raises:
        AssertionError: a behaviour does not hold; the message lists all that don't.
    """
    failed = [row for row in run_checks(method, **options) if row.error]
    lines = [f"{row.behaviour} ({row.family}, {row.precision}): {row.error}" for row in failed]
    assert not failed, f"{method!r} fails {len(failed)} checks:\n" + "\n".join(lines)
