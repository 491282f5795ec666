"""The doctor finds everything here in order, and names what is planted."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from petune.cli import doctor, main
from petune.core.host.seams import SEAMS as CORE
from petune.core.registry.plugins import Plugin, registry
from petune.loading.host import SEAMS as LOADING
from petune.training.host import SEAMS as TRAINING

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def as_json(capsys: Capture, code: int = 0) -> tuple[dict[str, Any], list[str]]:
    """What it prints, and its complaints."""
    capsys.readouterr()
    assert main(["doctor", "--json"]) == code
    said = capsys.readouterr()
    return json.loads(said.out), said.err.splitlines()


def test_all_is_well_here(capsys: Capture) -> None:
    found, complaints = as_json(capsys)
    assert complaints == []
    assert list(found) == ["versions", "devices", "seams", "plugins"]
    assert list(found["versions"]) == [
        "python",
        "petune",
        "platform",
        *doctor.LIBRARIES,
    ]
    assert torch.__version__.startswith(found["versions"]["torch"].partition("+")[0])
    cpu = found["devices"][0]
    assert list(cpu) == ["device", "name", "cores", "memory_bytes", "avx512_bf16"]
    assert (cpu["device"], cpu["cores"] > 0) == ("cpu", True)
    assert cpu["memory_bytes"] > 2**28
    assert len(found["devices"]) == 1 + torch.cuda.device_count() + (
        torch.backends.mps.is_available()
    )
    keys = ["library", "name", "since", "why", "holds", "trouble"]
    assert all(list(seam) == keys for seam in found["seams"])
    assert {(s["holds"], s["trouble"]) for s in found["seams"]} == {(True, None)}
    expected = [seam.name for seams in (CORE, TRAINING, LOADING) for seam in seams.all]
    assert [seam["name"] for seam in found["seams"]] == expected
    plugins = {plugin["name"]: plugin for plugin in found["plugins"]}
    assert list(plugins) == sorted(registry().plugins)
    assert list(plugins["lowrank"]) == ["name", "package", "version", "error"]


def test_tables(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr()
    versions, devices, seams, plugins, summary = said.out.split("\n\n")
    assert versions.splitlines()[0].split() == ["LIBRARY", "VERSION"]
    assert devices.splitlines()[1].startswith("cpu ")
    assert " cores, " in devices
    count = len(CORE.all) + len(TRAINING.all) + len(LOADING.all)
    assert seams.count("✓") == count
    assert plugins.count("✓") == len(registry().plugins)
    assert summary.startswith(f"{count} of {count} seams hold, ")
    assert said.err == ""


@pytest.mark.parametrize("seams", [CORE, TRAINING, LOADING])
def test_a_seam_that_does_not_hold_is_named(
    capsys: Capture, monkeypatch: Patch, seams: Any
) -> None:
    first, *others = seams.all
    broken = replace(first, check=lambda: False)
    monkeypatch.setattr(seams, "all", [broken, *others])
    found, complaints = as_json(capsys, code=1)
    (seam,) = (seam for seam in found["seams"] if not seam["holds"])
    assert seam["name"] == first.name
    assert seam["trouble"] == broken.trouble()
    assert complaints == [f"petune: {broken.trouble()}"]
    assert main(["doctor"]) == 1
    said = capsys.readouterr()
    assert f"✗  {first.library}" in said.out
    assert said.err.splitlines() == complaints


def test_seams_that_can_not_be_imported_are_named(
    capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.setitem(sys.modules, "petune.loading.host", None)
    found, complaints = as_json(capsys, code=1)
    (seam,) = (seam for seam in found["seams"] if not seam["holds"])
    assert seam["name"] == "petune.loading.host"
    assert len(complaints) == 1
    assert "petune.loading.host can't be imported (ModuleNotFoundError" in complaints[0]


def test_a_plugin_that_failed_is_named(capsys: Capture, monkeypatch: Patch) -> None:
    rotten = Plugin("rotten", "petune-rotten", "1.2", "ImportError: no 'core'")
    monkeypatch.setitem(registry().plugins, "rotten", rotten)
    found, complaints = as_json(capsys, code=1)
    assert vars(rotten) in found["plugins"]
    assert len(complaints) == 1
    assert "rotten (petune-rotten) is not loaded: ImportError" in complaints[0]


def test_a_library_that_is_missing(monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor, "LIBRARIES", ("torch", "no-such-library"))
    assert doctor.versions()["no-such-library"] == "not installed"


def test_cards(monkeypatch: Patch) -> None:
    def properties(index: int) -> SimpleNamespace:
        if index:
            raise RuntimeError("the driver is too old")
        return SimpleNamespace(name="H100", total_memory=2**36)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    good, bad = doctor.accelerators()
    assert good == {"device": "cuda:0", "name": "H100", "memory_bytes": 2**36}
    assert bad["name"] == "can't be used: the driver is too old"


def test_its_help_loads_no_torch() -> None:
    code = """
import sys
from petune.cli import doctor, main
assert main(["doctor", "--help"]) == 0
assert not {"torch", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout


def test_as_a_process_without_a_word_of_the_libraries() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "petune.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["plugins"]
