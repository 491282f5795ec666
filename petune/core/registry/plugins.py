"""Finding and loading plugins. Each is loaded on its own, so a broken one is named and the rest goes on."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from petune.core.registry import hookspecs
from petune.errors import PetuneError, unknown
from petune.files import at_home

GROUP = "petune"


@dataclass(frozen=True)
class Plugin:
    """One installed plugin: `error` says why it could not be loaded, if it could not."""

    name: str
    package: str
    version: str
    error: str | None = None


class Registry:
    """The plugins of one process and all that they bring."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(GROUP)
        self.manager.add_hookspecs(hookspecs)
        self.plugins: dict[str, Plugin] = {}
        self._found: dict[str, dict[str, tuple[Any, str]]] = {}
        for dist, entry in _entry_points():
            self._load(entry, dist)

    def _load(self, entry: EntryPoint, dist: Distribution) -> None:
        package, version = dist.metadata["Name"], dist.version
        try:
            self._register(entry.load(), entry.name)
            error = None
        except (
            Exception
        ) as reason:  # whatever a stranger's import raises must not stop the others
            error = f"{type(reason).__name__}: {reason}"
        self.plugins[entry.name] = Plugin(entry.name, package, version, error)

    def _register(self, plugin: object, name: str) -> None:
        self.manager.register(plugin, name)
        try:
            self.manager.check_pending()
        except pluggy.PluginValidationError:
            self.manager.unregister(name=name)
            raise

    def add_file(self, path: str | Path) -> None:
        """Load a single-file plugin.

        Raises:
            PetuneError: the file is missing, does not import or implements no hook.
        """
        path = at_home(path)
        if not path.is_file():
            raise PetuneError(f"--plugin {path}: no such file.")
        name = path.stem
        if name in self.plugins:
            if self.plugins[name].package == str(path.resolve()):
                return
            raise PetuneError(
                f"--plugin {path}: a plugin named {name!r} is loaded already; rename the file."
            )
        try:
            module = _import_file(path)
            self._register(module, name)
        except Exception as reason:
            raise PetuneError(
                f"--plugin {path}: {type(reason).__name__}: {reason}"
            ) from reason
        if not self.manager.get_hookcallers(module):
            self.manager.unregister(name=name)
            raise PetuneError(
                f"--plugin {path}: no hook in it; decorate petune_methods() with @petune.hookimpl."
            )
        self.plugins[name] = Plugin(name, str(path.resolve()), "file")
        self._found.clear()

    def all(self, hook: str) -> dict[str, Any]:
        """{name: object} of every plugin that loaded, for a hook such as `petune_methods`."""
        return {name: brought for name, (brought, _) in self._table(hook).items()}

    def get(self, hook: str, name: str, *others: str) -> Any:
        """What goes by `name`.

        Args:
            others: names that no plugin brings, to be listed where nothing does.

        Raises:
            PetuneError: nothing does; the message names the near misses and the plugins that failed to load.
        """
        table = self._table(hook)
        if name in table:
            return table[name][0]
        what = {"petune_quantizers": "precision", "petune_datasets": "data set"}.get(
            hook, hook[len("petune_") : -1]
        )
        failed = [f"{p.name} ({p.error})" for p in self.plugins.values() if p.error]
        note = f" Plugins that failed to load: {'; '.join(failed)}." if failed else ""
        raise PetuneError(unknown(what, name, [*table, *others]) + note)

    def owner(self, hook: str, name: str) -> str:
        """The plugin that brought `name`."""
        return self._table(hook)[name][1]

    def _table(self, hook: str) -> dict[str, tuple[Any, str]]:
        if hook not in self._found:
            self._found[hook] = self._collect(hook)
        return self._found[hook]

    def _collect(self, hook: str) -> dict[str, tuple[Any, str]]:
        table: dict[str, tuple[Any, str]] = {}
        # pluggy calls the last one registered first; names belong to whoever came first
        for impl in getattr(self.manager.hook, hook).get_hookimpls():
            try:
                brought = dict(impl.function())
                for taken in brought.keys() & table.keys():
                    first, second = (
                        self._package(table[taken][1]),
                        self._package(impl.plugin_name),
                    )
                    raise PetuneError(
                        f"{taken!r} is claimed by both {first} and {second}; uninstall one of them"
                    )
            except Exception as reason:
                self._fail(impl.plugin_name, reason)
            else:
                table.update(
                    {name: (thing, impl.plugin_name) for name, thing in brought.items()}
                )
        return table

    def _package(self, plugin: str) -> str:
        return (
            f"{plugin} ({self.plugins[plugin].package})"
            if plugin in self.plugins
            else plugin
        )

    def _fail(self, name: str, reason: Exception) -> None:
        old = self.plugins.get(name, Plugin(name, name, "file"))
        self.plugins[name] = Plugin(
            name, old.package, old.version, f"{type(reason).__name__}: {reason}"
        )


def _entry_points() -> Iterator[tuple[Distribution, EntryPoint]]:
    """Our own first, then by name: who owns a name must not depend on the order of the file system."""
    seen = set()
    found = [
        (d, e) for d in distributions() for e in d.entry_points if e.group == GROUP
    ]
    found.sort(
        key=lambda f: (
            f[0].metadata["Name"] != "petune",
            f[0].metadata["Name"],
            f[1].name,
        )
    )
    for dist, entry in found:
        if entry.name not in seen:  # an editable install can be found twice
            seen.add(entry.name)
            yield dist, entry


def _import_file(path: Path) -> ModuleType:
    name = f"petune_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file (name it *.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch look classes up by their module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@cache
def registry() -> Registry:
    """The process's registry, filled on first use."""
    return Registry()
