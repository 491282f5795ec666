"""A seam: one thing of another library that is not public and that petune leans on, with a check that it still holds.

Libraries move between two days. A seam whose check fails ends in an error that names the library, its version and
the remedy, in place of a wrong value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from petune.errors import MovedError

Check = Callable[[], bool]


@dataclass(frozen=True)
class Seam:
    """One thing that petune relies on.

    Args:
        library: the distribution that it belongs to, such as `transformers`.
        name: what is relied on, as its own library calls it.
        since: the first version of the library that has it.
        why: what petune does with it.
        check: whether it still is what petune takes it for. An exception counts as a no.
    """

    library: str
    name: str
    since: str
    why: str
    check: Check

    def trouble(self) -> str | None:
        """What is wrong and what to do, in one line; None if the seam holds."""
        try:
            if self.check():
                return None
            found = "is not what it was"
        except Exception as error:  # whatever the moved name raises, it has moved
            found = f"has moved ({type(error).__name__}: {error})"
        remedy = f"install a newer petune, or a {self.library} that it was tested with"
        here = f"{self.library} {installed(self.library)}"
        return f"{here}: {self.name} {found}. petune needs it to {self.why}: {remedy}."


class Seams:
    """The seams of one file, each declared beside the function that leans on it; or those of several together."""

    def __init__(self, *parts: Seams) -> None:
        self.all: list[Seam] = [seam for part in parts for seam in part.all]
        self.checked = False

    def lean(
        self, library: str, name: str, *, since: str, why: str
    ) -> Callable[[Check], Check]:
        """Declare a seam; decorates its check."""

        def declare(check: Check) -> Check:
            self.all.append(Seam(library, name, since, why, check))
            return check

        return declare

    def require(self) -> None:
        """Check every seam, once in a process.

        Raises:
            MovedError: one does not hold.
        """
        if not self.checked:
            raise_first(self.all)
            self.checked = True


def raise_first(seams: Iterable[Seam]) -> None:
    """Raise for the first seam that does not hold.

    Raises:
        MovedError: names the library, its version and the remedy.
    """
    for seam in seams:
        if (trouble := seam.trouble()) is not None:
            raise MovedError(trouble)


def installed(library: str) -> str:
    """The version of an installed distribution, or `not installed`."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"
