"""What a bug report has to say: versions, devices, seams with other libraries, plugins."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import typer

from petune.cli.inspect import AsJson, plugins_with_names
from petune.cli.output import as_json, table

if TYPE_CHECKING:
    from petune.core.host.seam import Seam

PACKAGES = (
    "petune",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "torchao",
    "safetensors",
    "pluggy",
)


def doctor(json: AsJson = False) -> None:
    """Show versions, devices and plugins, and whether all that petune relies on in other libraries still holds."""
    from petune.cli.devices import devices
    from petune.training.setup import quietly

    with quietly():
        report = {
            "versions": _versions(),
            "devices": devices(),
            "seams": [_checked(seam) for seam in _seams()],
            "plugins": [vars(plugin) for plugin, _ in plugins_with_names()],
        }
    if json:
        as_json(report)
    else:
        _print(report)
    if not _is_well(report):
        raise typer.Exit(1)


def _versions() -> dict[str, str]:
    from petune.core.host.seam import installed

    packages = {package: installed(package) for package in PACKAGES}
    return {
        "python": platform.python_version(),
        **packages,
        "platform": platform.platform(terse=True),
    }


def _seams() -> list[Seam]:
    """Every place where petune leans on something of another library that is not public."""
    from petune.core.host.seams import SEAMS as CORE
    from petune.loading.host import SEAMS as LOADING
    from petune.training.host import SEAMS as TRAINING

    return [*CORE.all, *LOADING.all, *TRAINING.all]


def _checked(seam: Seam) -> dict[str, Any]:
    trouble = seam.trouble()
    return {
        "library": seam.library,
        "name": seam.name,
        "since": seam.since,
        "holds": trouble is None,
        "trouble": trouble,
    }


def _is_well(report: dict[str, Any]) -> bool:
    """Whether all seams hold and no plugin failed."""
    seams = all(seam["holds"] for seam in report["seams"])
    return seams and not any(plugin["error"] for plugin in report["plugins"])


def _print(report: dict[str, Any]) -> None:
    """Four tables, and below the seams what is wrong with those that don't hold."""
    table(("package", "version"), list(report["versions"].items()))
    print()
    table(
        ("device", "name", "memory", "details"),
        [_device_row(d) for d in report["devices"]],
    )
    print()
    table(
        ("library", "seam", "since", "holds"), [_seam_row(s) for s in report["seams"]]
    )
    for seam in report["seams"]:
        if seam["trouble"] is not None:
            print(seam["trouble"])
    print()
    plugins = [_plugin_row(plugin) for plugin in report["plugins"]]
    table(("plugin", "package", "version", "error"), plugins)


def _seam_row(seam: dict[str, Any]) -> tuple[str, ...]:
    holds = "yes" if seam["holds"] else "NO"
    return seam["library"], seam["name"], seam["since"], holds


def _plugin_row(plugin: dict[str, Any]) -> tuple[str | None, ...]:
    return plugin["name"], plugin["package"], plugin["version"], plugin["error"]


def _device_row(device: dict[str, Any]) -> tuple[str, ...]:
    memory = device["memory_bytes"]
    shown = "unknown" if memory is None else f"{memory / 2**30:.1f} GiB"
    return device["device"], device["name"], shown, _details(device)


def _details(device: dict[str, Any]) -> str:
    """`8 cores, AVX2, AVX512, no AVX512-BF16` of a processor, the compute capability of a CUDA device."""
    if "capability" in device:
        return f"compute capability {device['capability']}"
    if "cores" not in device:
        return ""
    sets = [
        name if there else f"no {name}"
        for name, there in device["instructions"].items()
    ]
    return ", ".join([f"{device['cores']} cores", *sets])
