"""What is installed, and where a model can be adapted."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petune.cli.output import as_json, table, warn_of_failures
from petune.core.registry.plugins import Plugin, registry

if TYPE_CHECKING:
    from petune.core.frozen.site import Site
    from petune.testing import Row

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MethodNames = Annotated[
    str, typer.Argument(help="A method's name, or several as one tuning: lora+ia3.")
]
Families = Annotated[str, typer.Option(help="The families of models to run on.")]
Precisions = Annotated[str, typer.Option(help="The precisions to run at.")]
Arguments = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="An argument of the method, such as rank=4; of one of several: 'lora={rank: 4}'.",
    ),
]


SITE_KEYS = (
    "name",
    "kind",
    "role",
    "layer",
    "in_features",
    "out_features",
    "heads",
    "kv_heads",
    "head_dim",
)


def methods(
    json: AsJson = False,
    everything: Annotated[
        bool, typer.Option("--all", help="List names with a prefix too, one by one.")
    ] = False,
) -> None:
    """List the installed tuning methods with their arguments."""
    known = registry().all("petune_methods")
    more = [] if json or everything else _with_a_prefix(known)
    found = [_method(name, known[name]) for name in sorted(known) if name not in more]
    warn_of_failures()
    if json:
        as_json(found)
        return
    table(
        ("method", "plugin", "hook points", "mergeable", "arguments"),
        [_method_row(method) for method in found],
    )
    if more:
        prefixes = sorted({f"{name.partition(':')[0]}:…" for name in more})
        print(
            f"And {len(more)} more as {', '.join(prefixes)}, such as {more[0]}; --all lists them."
        )


def _with_a_prefix(names: Iterable[str]) -> list[str]:
    """Names such as `peft:hra`: other packages' methods, of which some take seconds to import."""
    return sorted(name for name in names if ":" in name)


def _method_row(method: dict[str, Any]) -> tuple[str, ...]:
    mergeable = "yes" if method["mergeable"] else "no"
    arguments = _call(method["arguments"])
    return method["name"], method["plugin"], method["where"], mergeable, arguments


def plugins(
    json: AsJson = False,
    requirements: Annotated[
        bool, typer.Option("--requirements", help="Print them as pip requirements.")
    ] = False,
) -> None:
    """List the installed plugins, and why one could not be loaded."""
    found = plugins_with_names()
    if requirements:
        installed = [plugin for plugin, _ in found if plugin.version != "file"]
        for line in sorted({f"{p.package}=={p.version}" for p in installed}):
            print(line)
    elif json:
        as_json([{**vars(plugin), "brings": sorted(names)} for plugin, names in found])
    else:
        rows = [_plugin_row(plugin, names) for plugin, names in found]
        table(("plugin", "package", "version", "brings"), rows)


def plugins_with_names() -> list[tuple[Plugin, list[str]]]:
    """The installed plugins, in the order of their names, each with the names of what it brings.

    All are asked for all that they bring, since a plugin may fail only then.
    """
    from petune.core.registry import hookspecs

    brought: dict[str, list[str]] = {}
    for hook in vars(hookspecs):
        if hook.startswith("petune_"):
            for name in registry().all(hook):
                brought.setdefault(registry().owner(hook, name), []).append(name)
    found = sorted(registry().plugins.values(), key=lambda plugin: plugin.name)
    return [(plugin, brought.get(plugin.name, [])) for plugin in found]


def _plugin_row(plugin: Plugin, brings: Sequence[str]) -> tuple[str, ...]:
    said = f"not loaded: {plugin.error}" if plugin.error else ", ".join(brings)
    return plugin.name, plugin.package, plugin.version, said


def sites(
    model: Annotated[
        str, typer.Argument(help="An alias, a local folder, a GGUF file or a Hub id.")
    ],
    head: Annotated[
        str | None, typer.Option(help="The head to put on it; its own by default.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Show where a model can be adapted, from its configuration alone: no weights are read."""
    import petune
    from petune.cli.tree import print_tree
    from petune.loading.models import skeleton

    found = petune.sites(skeleton(model, head=head))
    if json:
        as_json([_site(site) for site in found])
    else:
        print_tree(model, found)


def _site(site: Site) -> dict[str, Any]:
    values = {key: getattr(site, key) for key in SITE_KEYS}
    return {**values, "parts": sorted(site.parts)}


def check(
    method: MethodNames,
    families: Families = "llama gpt2 bert t5",
    precisions: Precisions = "fp32 nf4",
    argument: Arguments = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu or cuda.")] = "cpu",
    json: AsJson = False,
) -> None:
    """Run the conformance kit on a method: one row a behaviour, one column a family and precision."""
    import yaml
    from rich.console import Console

    from petune.testing import run_checks
    from petune.training.setup import quietly

    several = method.split("+")
    pairs = [pair.partition("=") for pair in argument or []]
    arguments = {key: yaml.safe_load(value) for key, _, value in pairs}
    where: dict[str, Any] = {
        "families": families.split(),
        "precisions": precisions.split(),
        "device": device,
    }
    rows = []
    with (
        quietly(),
        Console(stderr=True).status("") as status,
    ):  # nothing where there is no terminal
        for row in run_checks(
            several if len(several) > 1 else method, **where, **arguments
        ):
            rows.append(row)
            status.update(f"{row.family} {row.precision}: {row.behaviour} {row.mark}")
    if json:
        as_json([vars(row) for row in rows])
    else:
        _print_checks(rows)
    if any(row.error for row in rows):
        raise typer.Exit(1)


def _print_checks(rows: list[Row]) -> None:
    """The table, and under it each reason once with what it stands for."""
    from petune.testing import BEHAVIOURS, reasons

    columns = list(dict.fromkeys((row.family, row.precision) for row in rows))
    marks = {(row.behaviour, row.family, row.precision): row.mark for row in rows}
    cells = []
    for name in BEHAVIOURS:
        own = [marks.get((name, *column)) for column in columns]
        if any(own):
            cells.append((name, *own))
    table(("behaviour", *map(" ".join, columns)), cells)
    for what, found in reasons(rows).items():
        stream = sys.stderr if found[0].error else sys.stdout
        print(f"{found[0].mark} {what}", file=stream)


def _method(name: str, cls: Any) -> dict[str, Any]:
    from petune.core.method.arguments import arguments

    return {
        "name": name,
        "plugin": registry().owner("petune_methods", name),
        "where": cls.where,
        "mergeable": cls.mergeable,
        "arguments": {key: _argument(p) for key, p in arguments(cls).items()},
        "about": (inspect.getdoc(cls) or "").partition("\n")[0],
    }


def _argument(parameter: inspect.Parameter) -> dict[str, Any]:
    from petune.core.method.arguments import type_name

    found: dict[str, Any] = {"type": type_name(parameter.annotation)}
    if parameter.default is not parameter.empty:
        found["default"] = parameter.default
    return found


def _call(arguments: dict[str, dict[str, Any]]) -> str:
    """`rank: int = 8, ids: list[int]`"""
    words = []
    for name, argument in arguments.items():
        default = f" = {argument['default']!r}" if "default" in argument else ""
        words.append(f"{name}: {argument['type']}{default}")
    return ", ".join(words)
