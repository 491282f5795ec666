"""What is installed, and where a model can be adapted."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petune.cli.devices import check_device
from petune.cli.output import as_json, table, warn_of_failures
from petune.core.registry.plugins import Plugin, registry
from petune.errors import PetuneError

if TYPE_CHECKING:
    from petune.core.frozen.site import Site
    from petune.testing import Row

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
FAMILIES, PRECISIONS = "llama gpt2 bert t5", "fp32 nf4"
"""What `petune check` runs on unless told."""
ARGUMENT = (
    "An argument of the method, such as rank=4; of one of several: 'lora={rank: 4}'."
)
SITE_FIELDS = (
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
"""What `petune sites --json` says of a site, besides its parts."""


def methods(
    json: AsJson = False,
    everything: Annotated[
        bool, typer.Option("--all", help="List names with a prefix too, one by one.")
    ] = False,
) -> None:
    """List the installed tuning methods with their arguments."""
    known = registry().all("petune_methods")
    left_out = [] if json or everything else _prefixed(known)
    shown = sorted(known.keys() - set(left_out))
    found = [_method(name, known[name]) for name in shown]
    warn_of_failures()
    if json:
        as_json(found)
        return
    columns = ("method", "plugin", "hook points", "mergeable", "arguments")
    table(columns, [_method_row(method) for method in found])
    if left_out:
        prefixes = {name.partition(":")[0] + ":…" for name in left_out}
        print(
            f"And {len(left_out)} more as {', '.join(sorted(prefixes))}, "
            f"such as {left_out[0]}; --all lists them."
        )


def plugins(
    json: AsJson = False,
    requirements: Annotated[
        bool, typer.Option("--requirements", help="Print them as pip requirements.")
    ] = False,
) -> None:
    """List the installed plugins, and why one could not be loaded."""
    brought = names_by_plugin()
    found = sorted(registry().plugins.values(), key=lambda plugin: plugin.name)
    if requirements:
        _print_requirements(found)
    elif json:
        as_json([{**vars(p), "brings": sorted(brought.get(p.name, []))} for p in found])
    else:
        rows = [_plugin_row(plugin, brought.get(plugin.name, [])) for plugin in found]
        table(("plugin", "package", "version", "brings"), rows)


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


def check(
    method: Annotated[
        str, typer.Argument(help="A method's name, or several as one tuning: lora+ia3.")
    ],
    families: Annotated[
        list[str] | None,
        typer.Option(help=f"The families of models to run on ({FAMILIES})."),
    ] = None,
    precisions: Annotated[
        list[str] | None, typer.Option(help=f"The precisions to run at ({PRECISIONS}).")
    ] = None,
    argument: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help=ARGUMENT)
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu or cuda.")] = "cpu",
    json: AsJson = False,
) -> None:
    """Run the conformance kit on a method: one row a behaviour, one column a family and precision."""
    check_device(device)
    rows = _run_checks(
        method.split("+"),
        _values(argument or []),
        families=_words(families or [FAMILIES]),
        precisions=_words(precisions or [PRECISIONS]),
        device=device,
    )
    if json:
        as_json([vars(row) for row in rows])
    else:
        _print_checks(rows)
    if any(row.error for row in rows):
        raise typer.Exit(1)


def names_by_plugin() -> dict[str, list[str]]:
    """What each plugin brings. Every hook is called, and the registry notes the plugins that fail only then."""
    from petune.core.registry import hookspecs

    hooks = [name for name in vars(hookspecs) if name.startswith("petune_")]
    brought: dict[str, list[str]] = {}
    for hook in hooks:
        for name in registry().all(hook):
            owner = registry().owner(hook, name)
            brought.setdefault(owner, []).append(name)
    return brought


def _plugin_row(plugin: Plugin, names: list[str]) -> tuple[str, ...]:
    brings = f"not loaded: {plugin.error}" if plugin.error else ", ".join(names)
    return (plugin.name, plugin.package, plugin.version, brings)


def _print_requirements(found: list[Plugin]) -> None:
    """One line a package; single files have none."""
    packaged = [plugin for plugin in found if plugin.version != "file"]
    lines = {f"{plugin.package}=={plugin.version}" for plugin in packaged}
    for line in sorted(lines):
        print(line)


def _site(site: Site) -> dict[str, Any]:
    fields = {key: getattr(site, key) for key in SITE_FIELDS}
    return {**fields, "parts": sorted(site.parts)}


def _words(given: list[str]) -> list[str]:
    """The words of an option that may be given several times, each once."""
    return list(dict.fromkeys(" ".join(given).split()))


def _values(pairs: list[str]) -> dict[str, Any]:
    """The values of KEY=VALUE options, read as YAML."""
    from petune.training.yaml_text import read_value

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise PetuneError(f"--argument {pair!r}: write KEY=VALUE, such as rank=4.")
        if key in found:
            raise PetuneError(f"--argument: {key!r} is given twice; give it once.")
        found[key] = read_value(value, f"--argument {pair!r}")
    return found


def _run_checks(
    methods: list[str], arguments: dict[str, Any], **where: Any
) -> list[Row]:
    """Run the conformance kit; a terminal shows the check that was last done."""
    from rich.console import Console

    from petune.testing import run_checks
    from petune.training.setup import quietly

    method = methods if len(methods) > 1 else methods[0]
    rows = []
    with quietly(), Console(stderr=True).status("") as status:
        for row in run_checks(method, **where, **arguments):
            rows.append(row)
            status.update(f"{row.family} {row.precision}: {row.behaviour} {row.mark}")
    return rows


def _print_checks(rows: list[Row]) -> None:
    """The table, and under it each reason once with what it stands for."""
    from petune.testing import BEHAVIOURS, reasons

    columns = list(dict.fromkeys((row.family, row.precision) for row in rows))
    marks = {(row.behaviour, row.family, row.precision): row.mark for row in rows}
    checked = {row.behaviour for row in rows}
    cells = []
    for name in BEHAVIOURS:
        if name in checked:
            found = [marks.get((name, *column)) for column in columns]
            cells.append((name, *found))
    table(("behaviour", *map(" ".join, columns)), cells)
    for what, told in reasons(rows).items():
        stream = sys.stderr if told[0].error else sys.stdout
        print(f"{told[0].mark} {what}", file=stream)


def _prefixed(known: Iterable[str]) -> list[str]:
    """The names with a prefix, such as `peft:hra`. Some take seconds to import."""
    return sorted(name for name in known if ":" in name)


def _method(name: str, cls: type) -> dict[str, Any]:
    from petune.core.method.arguments import arguments

    known: Any = cls
    return {
        "name": name,
        "plugin": registry().owner("petune_methods", name),
        "where": known.where,
        "mergeable": known.mergeable,
        "arguments": {key: _argument(p) for key, p in arguments(cls).items()},
        "about": (inspect.getdoc(cls) or "").partition("\n")[0],
    }


def _argument(parameter: inspect.Parameter) -> dict[str, Any]:
    """The type of an argument, and its default where it has one."""
    from petune.core.method.arguments import type_name

    found: dict[str, Any] = {"type": type_name(parameter.annotation)}
    if parameter.default is not parameter.empty:
        found["default"] = parameter.default
    return found


def _method_row(method: dict[str, Any]) -> tuple[str, ...]:
    mergeable = "yes" if method["mergeable"] else "no"
    shown = [_shown(key, a) for key, a in method["arguments"].items()]
    return (
        method["name"],
        method["plugin"],
        method["where"],
        mergeable,
        ", ".join(shown),
    )


def _shown(name: str, argument: dict[str, Any]) -> str:
    """An argument as Python writes it: `rank: int = 8`."""
    default = f" = {argument['default']!r}" if "default" in argument else ""
    return f"{name}: {argument['type']}{default}"
