"""Installing and removing plugins: pip, in the environment that petune runs in."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from petune.errors import PetuneError

Packages = Annotated[
    list[str], typer.Argument(metavar="PKG...", help="Packages, and options of pip's.")
]


def install(packages: Packages) -> None:
    """Install plugin packages into this environment, as pip does."""
    _pip("install", *packages)


def uninstall(packages: Packages) -> None:
    """Remove plugin packages from this environment."""
    _pip("uninstall", "--yes", *packages)


def _pip(action: str, *words: str) -> None:
    if find_spec("pip") is None:
        wanted = " ".join(word for word in words if not word.startswith("-"))
        raise PetuneError(
            f"this environment has no pip: run `uv pip {action} --python {sys.executable} {wanted}`."
        )
    command = [sys.executable, "-m", "pip", action, *words]
    code = subprocess.run(command).returncode  # pip's own words reach the user
    if code:
        raise PetuneError(
            f"pip {action} failed (exit code {code}); its reason stands above."
        )
