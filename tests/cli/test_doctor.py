import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from petune.cli import devices, main
from petune.core.host.seam import Seams
from petune.core.registry.plugins import Plugin, registry

CPUINFO = """processor\t: 0
model name\t: A processor
flags\t\t: fpu avx2 avx512f amx_bf16

processor\t: 1
model name\t: Another
"""


@pytest.fixture
def seams(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The seams of every floor, which the test declares."""
    found = SimpleNamespace(core=Seams(), loading=Seams(), training=Seams())
    for name, home in (
        ("core", "petune.core.host.seams"),
        ("loading", "petune.loading.host"),
        ("training", "petune.training.host"),
    ):
        module = ModuleType(home)
        module.SEAMS = getattr(found, name)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, home, module)
    found.core.lean("torch", "Tensor.holds", since="2.1", why="test")(lambda: True)
    found.training.lean("datasets", "a[b]", since="4.0", why="test")(lambda: True)
    return found


def test_tables(seams: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    versions, found, held, plugins = capsys.readouterr().out.split("\n\n")
    names = [line.split()[0] for line in versions.splitlines()]
    assert names == [
        "PACKAGE",
        "python",
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
        "platform",
    ]
    assert found.splitlines()[1].startswith("cpu ")
    assert " cores" in found
    assert held.splitlines()[0].split() == ["LIBRARY", "SEAM", "SINCE", "HOLDS"]
    assert held.splitlines()[1].split() == ["torch", "Tensor.holds", "2.1", "yes"]
    assert held.splitlines()[2].split() == ["datasets", "a[b]", "4.0", "yes"]
    assert any(line.startswith("lowrank ") for line in plugins.splitlines())


def test_json(seams: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["versions", "devices", "seams", "plugins"]
    assert report["versions"]["python"].startswith("3.")
    assert report["devices"][0]["device"] == "cpu"
    assert report["devices"][0]["cores"] > 0
    assert report["devices"][0]["memory_bytes"] > 2**28
    assert report["seams"][0] == {
        "library": "torch",
        "name": "Tensor.holds",
        "since": "2.1",
        "holds": True,
        "trouble": None,
    }
    assert {"name", "package", "version", "error"} == report["plugins"][0].keys()


def test_a_seam_that_does_not_hold(
    seams: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    seams.loading.lean("transformers", "gone", since="5.0", why="load")(lambda: False)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert ["transformers", "gone", "5.0", "NO"] in [
        line.split() for line in out.splitlines()
    ]
    assert "gone is not what it was. petune needs it to load: install a newer" in out
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (broken,) = [seam for seam in report["seams"] if not seam["holds"]]
    assert broken["trouble"].startswith("transformers ")


def test_a_plugin_that_failed(
    seams: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = Plugin("rotten", "petune-rotten", "1.2", "ImportError: no such thing")
    monkeypatch.setitem(registry().plugins, "rotten", broken)
    assert main(["doctor"]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["rotten", "petune-rotten", "1.2", *broken.error.split()] in rows  # type: ignore[union-attr]


def test_what_is_missing_is_said(
    seams: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "petune.core.host.seam.installed", lambda library: "not installed"
    )
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torchao"] == "not installed"


def test_instruction_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO)
    monkeypatch.setattr(devices, "CPUINFO", file)
    processor = devices.devices()[0]
    assert processor["name"] == "A processor"
    assert processor["instructions"] == {
        "AVX2": True,
        "AVX512": True,
        "AVX512-VNNI": False,
        "AVX512-BF16": False,
        "AMX-BF16": True,
    }


def test_here_all_seams_hold(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("petune.training.host")
    pytest.importorskip("petune.loading.host")
    main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [seam["trouble"] for seam in report["seams"] if seam["trouble"]] == []
    assert {seam["library"] for seam in report["seams"]} >= {"torch", "transformers"}
