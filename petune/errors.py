"""The errors a user can cause. The command line prints one as a single line and exits with its code, which is 2 but
where a training diverged.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class PetuneError(ValueError):
    """A mistake of the user's: the message names the culprit and the remedy."""

    exit_code: ClassVar[int] = 2
    """What the command line ends with."""


class DivergedError(PetuneError):
    """A training came to weights or scores that are no numbers. Nothing is wrong with its files."""

    exit_code = 1


class UnmergeableError(PetuneError, TypeError):
    """The method has no merged form, or not on this model."""


class UnsupportedError(PetuneError, TypeError):
    """This model, precision or method can't do what was asked, whatever the arguments."""


class MovedError(PetuneError):
    """A library has changed something that petune leans on: the message names it, its version and the remedy."""


class PetuneWarning(UserWarning):
    """Something that petune did and that a user should know of. The command line prints one as a single line."""


LISTED = 4
"""How many of the known names a message lists."""


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """`unknown key 'stpes'. Did you mean 'steps'? Known: batch_size, epochs, seed, steps, …`"""
    names = sorted(known)
    near = _near(str(name), names)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    others = [name for name in names if name not in near]
    shown = sorted([*near, *others][:LISTED])
    left_out = len(shown) < len(names)
    said = ", ".join(shown) or "none"
    return f"unknown {what} {name!r}.{hint} Known: {said}{', …' if left_out else '.'}"


def _near(name: str, names: list[str]) -> list[str]:
    """The names that are meant, perhaps: one that differs in letter case alone, else the two that look most alike."""
    same = [other for other in names if other.casefold() == name.casefold()]
    return same or get_close_matches(name, names, n=2, cutoff=0.6)


def listed(names: Iterable[object]) -> str:
    """The first four names; `…` stands for the rest."""
    shown = [str(name) for name in names]
    more = ["…"] if len(shown) > LISTED else []
    return ", ".join([*shown[:LISTED], *more])
