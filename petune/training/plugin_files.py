"""The single-file plugins that a run needs: it remembers them, and brings them back when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from petune.core.registry.plugins import registry
from petune.errors import PetuneError
from petune.files import read_json
from petune.training.recipe import Recipe

FILE = "plugins.json"
_UNNAMED = "petune_sites"
"""A hook that acts on any model, so that no name in a recipe tells whether it is needed."""


def needed(recipe: Recipe) -> dict[str, Any]:
    """By the plugin's name, the path and the sha256 of each file that the recipe's run needs."""
    known = registry()
    owners = {
        known.owner(hook, name)
        for hook, name in _names(recipe)
        if name in known.all(hook)
    }
    owners |= {known.owner(_UNNAMED, name) for name in known.all(_UNNAMED)}
    files = {
        name: Path(plugin.package)
        for name, plugin in known.plugins.items()
        if plugin.version == "file" and name in owners
    }
    return {
        name: {"path": str(path), "sha256": _digest(path)}
        for name, path in files.items()
    }


def bring_back(run: Path) -> None:
    """Load the files that a run was trained with. One that was loaded before by the same name stands for it.

    Raises:
        PetuneError: a file is missing, or is no longer what it was.
    """
    noted = read_json(run / FILE) if (run / FILE).exists() else {}
    for name, about in noted.items():
        if name in registry().plugins:
            continue
        path, digest = _read(run, about)
        if not path.is_file():
            raise PetuneError(
                f"{path}: no such file, and {run} was trained with this plugin; put it back, or name it by --plugin."
            )
        if _digest(path) != digest:
            raise PetuneError(
                f"{path}: has changed since {run} was trained with it; --plugin {path} takes it as it is."
            )
        registry().add_file(path)


def _read(run: Path, about: Any) -> tuple[Path, str]:
    try:
        return Path(about["path"]), str(about["sha256"])
    except (KeyError, TypeError):
        raise PetuneError(
            f"{run / FILE}: a plugin there has no path and sha256."
        ) from None


def _names(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(hook, name) of all that a recipe calls by a name."""
    methods = [recipe.method] if isinstance(recipe.method, str) else recipe.method
    for method in methods:
        yield "petune_methods", method
    yield "petune_tasks", recipe.task
    yield "petune_quantizers", recipe.precision
    yield "petune_models", recipe.model
    if isinstance(recipe.data, str):
        yield "petune_datasets", recipe.data


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
