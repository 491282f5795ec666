"""What is installed, and where a model can be adapted."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petune.cli.output import as_json, table, warn_of_failures
from petune.core.registry.plugins import registry

if TYPE_CHECKING:
    from petune.testing import Row

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ARGUMENT = (
    "An argument of the method, such as rank=4; of one of several: 'lora={rank: 4}'."
)


def methods(
    json: AsJson = False,
    everything: Annotated[
        bool, typer.Option("--all", help="List names with a prefix too, one by one.")
    ] = False,
) -> None:
    """List the installed tuning methods with their arguments."""
    known = registry().all("petune_methods")
    more = (
        [] if json or everything else sorted(name for name in known if ":" in name)
    )  # some take seconds to import
    found = [
        _method(name, cls) for name, cls in sorted(known.items()) if name not in more
    ]
    warn_of_failures()
    if json:
        as_json(found)
        return
    rows = [
        (
            m["name"],
            m["plugin"],
            m["where"],
            "yes" if m["mergeable"] else "no",
            _call(m["arguments"]),
        )
        for m in found
    ]
    table(("method", "plugin", "hook points", "mergeable", "arguments"), rows)
    if more:
        prefixes = ", ".join(sorted({name.partition(":")[0] + ":…" for name in more}))
        print(
            f"And {len(more)} more as {prefixes}, such as {more[0]}; --all lists them."
        )


def plugins(
    json: AsJson = False,
    requirements: Annotated[
        bool, typer.Option("--requirements", help="Print them as pip requirements.")
    ] = False,
) -> None:
    """List the installed plugins, and why one could not be loaded."""
    from petune.core.registry import hookspecs

    hooks = [name for name in vars(hookspecs) if name.startswith("petune_")]
    brought: dict[str, list[str]] = {}
    for hook in hooks:  # a plugin may fail only when it is asked
        for name in registry().all(hook):
            brought.setdefault(registry().owner(hook, name), []).append(name)
    found = sorted(registry().plugins.values(), key=lambda plugin: plugin.name)
    if requirements:
        for line in sorted(
            {f"{p.package}=={p.version}" for p in found if p.version != "file"}
        ):
            print(line)
    elif json:
        as_json(
            [
                {**vars(plugin), "brings": sorted(brought.get(plugin.name, []))}
                for plugin in found
            ]
        )
    else:
        rows = [
            (
                p.name,
                p.package,
                p.version,
                f"not loaded: {p.error}"
                if p.error
                else ", ".join(brought.get(p.name, [])),
            )
            for p in found
        ]
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
        keys = (
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
        as_json(
            [
                {key: getattr(site, key) for key in keys}
                | {"parts": sorted(site.parts)}
                for site in found
            ]
        )
        return
    print_tree(model, found)


def check(
    method: Annotated[
        str, typer.Argument(help="A method's name, or several as one tuning: lora+ia3.")
    ],
    families: Annotated[
        str, typer.Option(help="The families of models to run on.")
    ] = "llama gpt2 bert t5",
    precisions: Annotated[
        str, typer.Option(help="The precisions to run at.")
    ] = "fp32 nf4",
    argument: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help=ARGUMENT)
    ] = None,
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
    names = [name for name in BEHAVIOURS if name in {row.behaviour for row in rows}]
    cells = [
        (name, *(marks.get((name, *column)) for column in columns)) for name in names
    ]
    table(("behaviour", *map(" ".join, columns)), cells)
    for what, found in reasons(rows).items():
        print(
            f"{found[0].mark} {what}", file=sys.stderr if found[0].error else sys.stdout
        )


def _method(name: str, cls: type) -> dict[str, Any]:
    from petune.core.method.arguments import arguments, type_name

    known: Any = cls
    return {
        "name": name,
        "plugin": registry().owner("petune_methods", name),
        "where": known.where,
        "mergeable": known.mergeable,
        "arguments": {
            key: {"type": type_name(p.annotation)}
            | ({} if p.default is p.empty else {"default": p.default})
            for key, p in arguments(cls).items()
        },
        "about": (inspect.getdoc(cls) or "").partition("\n")[0],
    }


def _call(arguments: dict[str, dict[str, Any]]) -> str:
    """`rank: int = 8, ids: list[int]`"""
    return ", ".join(
        f"{key}: {a['type']}" + (f" = {a['default']!r}" if "default" in a else "")
        for key, a in arguments.items()
    )
