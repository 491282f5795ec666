"""The devices that a model may run on: the processor, CUDA devices and Apple's graphics processor."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petune.errors import PetuneError, listed, unknown

CPUINFO = Path("/proc/cpuinfo")
# the instruction sets that change how fast a model runs -> what Linux calls them
X86 = {
    "AVX2": "avx2",
    "AVX512": "avx512f",
    "AVX512-VNNI": "avx512_vnni",
    "AVX512-BF16": "avx512_bf16",
    "AMX-BF16": "amx_bf16",
}
ARM = {"NEON": "asimd", "SVE": "sve", "BF16": "bf16", "I8MM": "i8mm"}


def devices() -> list[dict[str, Any]]:
    """Every device with its name and its memory in bytes; None where a system does not tell."""
    return [_processor(), *_cuda(), *_mps()]


def check_device(name: str) -> None:
    """See that there is a device of this name, as torch writes it.

    Raises:
        PetuneError: there is none here.
    """
    import torch

    here = [str(device["device"]) for device in devices()]
    known = {*here, *(device.partition(":")[0] for device in here)}
    try:
        torch.device(name)
    except RuntimeError:
        raise PetuneError(f"--device: {unknown('device', name, known)}") from None
    if name not in known:
        raise PetuneError(f"--device {name}: this machine has {listed(sorted(known))}.")


def _processor() -> dict[str, Any]:
    facts = _cpuinfo()
    name = facts.get("model name") or platform.processor() or platform.machine()
    return {
        "device": "cpu",
        "name": name,
        "memory_bytes": _memory(),
        "cores": _cores(),
        "instructions": _instructions(facts),
    }


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first core; empty on other systems."""
    found: dict[str, str] = {}
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    return found


def _instructions(facts: Mapping[str, str]) -> dict[str, bool]:
    """Whether the processor has each of the instruction sets that matter; elsewhere than on Linux, what torch uses."""
    if "flags" in facts:
        words, known = facts["flags"].split(), X86
    elif "Features" in facts:
        words, known = facts["Features"].split(), ARM
    else:
        import torch

        return {torch.backends.cpu.get_cpu_capability(): True}
    return {name: flag in words for name, flag in known.items()}


def _cores() -> int | None:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cuda() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": facts.name,
                "memory_bytes": facts.total_memory,
                "capability": f"{facts.major}.{facts.minor}",
            }
        )
    return found


def _mps() -> list[dict[str, Any]]:
    import torch

    if not torch.backends.mps.is_available():
        return []
    memory = torch.mps.recommended_max_memory()
    return [{"device": "mps", "name": platform.processor(), "memory_bytes": memory}]
