"""What a look at this machine finds: the libraries, the devices, the seams with other libraries and the plugins."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from petune.cli.inspect import AsJson, names_by_plugin
from petune.cli.output import as_json, complain, table, warn_of_failures
from petune.core.host.seam import Seam, installed
from petune.core.registry.plugins import registry

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "torchao",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "pluggy",
    "pydantic",
    "typer",
)
SEAM_MODULES = ("petune.core.host.seams", "petune.training.host", "petune.loading.host")
"""The modules that hold all seams, each as `SEAMS`."""


def doctor(json: AsJson = False) -> None:
    """Show versions, devices and plugins, and whether what petune needs of other libraries is still there."""
    from rich.console import Console

    waiting = Console(stderr=True).status("importing the libraries ...")
    with waiting, _without_logs():  # the status shows on a terminal only
        found = diagnosis()
    if json:
        as_json(found)
    else:
        _print_tables(found)
    broken = [seam for seam in found["seams"] if not seam["holds"]]
    for seam in broken:
        complain(seam["trouble"])
    warn_of_failures()
    if broken or any(plugin["error"] for plugin in found["plugins"]):
        raise typer.Exit(1)


def diagnosis() -> dict[str, Any]:
    """All that the doctor looks at, as `petune doctor --json` prints it. Sizes are in bytes."""
    return {
        "versions": versions(),
        "devices": [_cpu(), *accelerators()],
        "seams": [row for module in SEAM_MODULES for row in _seams_of(module)],
        "plugins": _plugins(),
    }


def versions() -> dict[str, str]:
    """Of Python, petune, the platform and the libraries; `not installed` for a library that is missing."""
    from petune import __version__

    return {
        "python": platform.python_version(),
        "petune": __version__,
        "platform": platform.platform(),
        **{library: installed(library) for library in LIBRARIES},
    }


def _cpu() -> dict[str, Any]:
    """The processor, with the cores that this process may use; None is what the system does not tell."""
    info = _cpuinfo()
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    return {
        "device": "cpu",
        "name": info.get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "memory_bytes": _memory(),
        "avx512_bf16": "avx512_bf16" in info.get("flags", "").split() if info else None,
    }


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first core; empty on other systems."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    first = text.partition("\n\n")[0]
    pairs = [line.partition(":") for line in first.splitlines()]
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory() -> int | None:
    """The machine's memory in bytes; None on Windows, where Python can't tell."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def accelerators() -> list[dict[str, Any]]:
    """The devices beside the processor that torch can use; none where torch can't be imported."""
    try:
        import torch
    except Exception:  # the seams, which need torch too, say why
        return []
    found = [_cuda(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        memory = torch.mps.recommended_max_memory()
        found.append({"device": "mps", "name": "Metal", "memory_bytes": memory})
    return found


def _cuda(index: int) -> dict[str, Any]:
    """A CUDA device; one that torch counts but can't use has the reason for its name."""
    import torch

    device = f"cuda:{index}"
    try:
        card = torch.cuda.get_device_properties(index)
    except Exception as error:  # such as a driver older than torch's CUDA
        reason = f"can't be used: {error}"
        return {"device": device, "name": reason, "memory_bytes": None}
    return {"device": device, "name": card.name, "memory_bytes": card.total_memory}


def _seams_of(module: str) -> list[dict[str, Any]]:
    """The seams of a module, each with whether it holds.

    A library may have moved so far that the module can't even be imported. That is one row that does not hold.
    """
    try:
        seams: list[Seam] = import_module(module).SEAMS.all
    except Exception as error:  # whatever the import of a moved name raises
        reason = f"{type(error).__name__}: {error}"
        trouble = f"{module} can't be imported ({reason}), so its seams are unchecked."
        return [_row("petune", module, "", "check its seams", trouble)]
    return [
        _row(seam.library, seam.name, seam.since, seam.why, seam.trouble())
        for seam in seams
    ]


def _row(
    library: str, name: str, since: str, why: str, trouble: str | None
) -> dict[str, Any]:
    return {
        "library": library,
        "name": name,
        "since": since,
        "why": why,
        "holds": trouble is None,
        "trouble": trouble,
    }


def _plugins() -> list[dict[str, Any]]:
    """The plugins by name, with the reason where one failed to load or to answer."""
    names_by_plugin()  # some fail only when they are asked
    found = registry().plugins
    return [dict(vars(found[name])) for name in sorted(found)]


def _print_tables(found: dict[str, Any]) -> None:
    table(("library", "version"), list(found["versions"].items()))
    print()
    devices = [(d["device"], d["name"], _about(d)) for d in found["devices"]]
    table(("device", "name", "about"), devices)
    print()
    seams = [
        (_mark(seam["holds"]), seam["library"], seam["since"], seam["name"])
        for seam in found["seams"]
    ]
    table(("", "library", "since", "what petune needs of it"), seams)
    print()
    plugins = [
        (_mark(not p["error"]), p["name"], p["package"], p["version"], p["error"])
        for p in found["plugins"]
    ]
    table(("", "plugin", "package", "version", "error"), plugins)
    print()
    print(f"{_count(seams)} seams hold, {_count(plugins)} plugins work.")


def _about(device: dict[str, Any]) -> str:
    """A device's cores, memory and AVX512-BF16, as far as they are known."""
    words = []
    if "cores" in device:
        words.append(f"{device['cores']} cores")
    if device["memory_bytes"]:
        words.append(f"{device['memory_bytes'] / 2**30:.1f} GiB")
    bf16 = device.get("avx512_bf16")
    if bf16 is not None:
        words.append("AVX512-BF16" if bf16 else "no AVX512-BF16")
    return ", ".join(words)


def _count(rows: Sequence[Sequence[object]]) -> str:
    """How many rows of a table have the mark, of how many: `3 of 4`."""
    good = [row for row in rows if row[0] == _mark(True)]
    return f"{len(good)} of {len(rows)}"


def _mark(good: bool) -> str:
    return "✓" if good else "✗"


@contextmanager
def _without_logs() -> Iterator[None]:
    """Within the context nothing is logged: libraries log which optional parts of theirs are missing."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
