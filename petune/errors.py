"""The errors a user can cause. The command line prints one as a single line and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PetuneError(ValueError):
    """A mistake of the user's: the message names the culprit and the remedy."""


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
    """`unknown key 'stpes'. Did you mean 'steps'? Known: epochs, steps.`"""
    names = sorted(known)
    near = get_close_matches(str(name), names, n=2, cutoff=0.6)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    listed = [*names[:LISTED], "…"] if len(names) > LISTED else names
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(listed) or 'none'}."
