import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from samples import jsonl, opinions

from petune.cli import main
from petune.core.registry.plugins import Plugin, registry

METHOD = '''
import petune
from torch import nn
import torch

class Shift(petune.Adapter):
    """y = W x + b"""
    where, mergeable = "q v", True
    def __init__(self, site, *, scale: float = 2.0):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(site.out_features))
        self.scale = scale
    def forward(self, inner, x):
        return inner(x) + self.scale * self.b

def hello(name: str = "you") -> None:
    """Greet."""
    print(f"hello {name}")

@petune.hookimpl
def petune_methods():
    return {"shift": Shift}

@petune.hookimpl
def petune_commands():
    return {"hello": hello}
'''


@pytest.fixture
def plugin(tmp_path: Path, single_files: None) -> str:
    path = tmp_path / "shifting.py"
    path.write_text(METHOD)
    return str(path)


def test_help_is_quick_and_loads_no_torch() -> None:
    code = """
import sys
from petune.cli import main
code = main(["--help"])
assert not {"torch", "transformers"} & set(sys.modules)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("methods", "plugins", "install", "train", "predict"):
        assert name in done.stdout


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == [
        "METHOD",
        "PLUGIN",
        "HOOK",
        "POINTS",
        "MERGEABLE",
        "ARGUMENTS",
    ]
    assert any(line.startswith("lora ") and "rank: int = 8" in line for line in table)
    assert main(["methods", "--json"]) == 0
    found = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    assert found["lora"]["arguments"]["rank"] == {"type": "int", "default": 8}
    assert found["lora"]["mergeable"] is True
    assert found["lora"]["plugin"] == "lowrank"
    assert "o" in found["lora"]["where"].split()


def test_plugins_tells_why_one_was_not_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Plugin(
        "rotten", "petune-rotten", "1.2", "ImportError: no module named 'core'"
    )
    monkeypatch.setitem(registry().plugins, "rotten", broken)
    assert main(["plugins"]) == 0
    assert "not loaded: ImportError: no module named 'core'" in capsys.readouterr().out
    assert main(["plugins", "--json"]) == 0
    found = {plugin["name"]: plugin for plugin in json.loads(capsys.readouterr().out)}
    assert found["rotten"]["error"].startswith("ImportError")
    assert found["lowrank"]["error"] is None
    assert "lora" in found["lowrank"]["brings"]
    assert main(["plugins", "--requirements"]) == 0
    assert "petune-rotten==1.2" in capsys.readouterr().out.splitlines()
    assert main(["methods"]) == 0
    said = capsys.readouterr()
    assert (
        "warning: plugin rotten (petune-rotten) is not loaded: ImportError" in said.err
    )
    assert "lora" in said.out


def test_sites(capsys: pytest.CaptureFixture[str], encoder: Path) -> None:
    assert main(["sites", str(encoder)]) == 0
    tree = capsys.readouterr().out
    assert "encoder.layer.0-1 layer  64" in tree
    assert "intermediate.dense up  64 → 128" in tree
    assert "attention.self attention  4 heads of 16" in tree
    assert main(["sites", str(encoder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"name", "kind", "role", "layer", "in_features", "out_features"} <= set(
        found[0]
    )
    assert {"q", "k", "v", "o"} <= {site["role"] for site in found}


def test_sites_need_no_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path)  # 7 billion parameters
    assert main(["sites", str(tmp_path)]) == 0
    tree = capsys.readouterr().out
    assert "model.layers.0-31 layer  4096" in tree
    assert "gate_proj gate  4096 → 11008" in tree


def test_train_eval_predict_merge(
    file: str,
    recipe: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", file, "training.steps=4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 4
    assert main(["eval", recipe["output"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(
        result["score"]
    )
    rows = opinions(10, seed=3)
    data = jsonl(tmp_path / "new.jsonl", rows)
    out = tmp_path / "out" / "answers.jsonl"
    assert (
        main(
            [
                "predict",
                recipe["output"],
                "--data",
                str(data),
                "--json",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in printed] == [row["id"] for row in rows]
    assert all(row["prediction"] in ("neg", "pos") for row in printed)
    assert [json.loads(line) for line in out.read_text().splitlines()] == printed
    assert main(["eval", recipe["output"], "--data", str(data)]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["merge", recipe["output"], str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_export(
    generation: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from petune.training import train

    train(generation, quiet=True)
    run = generation["output"]
    for form, file in [
        ("peft", "adapter_config.json"),
        ("serving", "adapter_config.json"),
        ("dense", "config.json"),
    ]:
        out = tmp_path / form
        assert main(["export", run, str(out), "--format", form]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        assert (out / file).exists()
        assert main(["export", run, str(out), "--format", form]) == 2
        assert "exists already" in capsys.readouterr().err
    assert main(["export", run, str(tmp_path / "x"), "--format", "gguf"]) == 2
    assert "convert_lora_to_gguf.py on `petune export" in capsys.readouterr().err
    assert main(["export", run, str(tmp_path / "x"), "--format", "onnx"]) == 2
    assert (
        "unknown format 'onnx'. Known: dense, peft, serving." in capsys.readouterr().err
    )
    assert not (tmp_path / "x").exists()


def test_merging_into_the_same_precision_says_what_it_costs(
    file: str,
    recipe: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", file, "training.steps=4", "precision=nf4", "--quiet"]) == 0
    capsys.readouterr()
    assert (
        main(["merge", recipe["output"], str(tmp_path / "merged"), "--quantized"]) == 0
    )
    path, cost = capsys.readouterr().out.splitlines()
    assert path == str(tmp_path / "merged")
    assert re.fullmatch(
        r"13 layers: relative error 0\.0\d+ \(worst 0\.\d+, bert.*\), .* of what the tuning changes",
        cost,
    )


PICKY = '''
import petune


class Picky(petune.Adapter):
    """Acts on layers of enough width alone."""

    where = "q"

    def __init__(self, site):
        super().__init__()
        raise petune.UnsupportedError("picky: width 64 is not enough for these layers.")


@petune.hookimpl
def petune_methods():
    return {"picky": Picky}
'''


@pytest.mark.usefixtures("single_files")
def test_check_shows_a_table_and_the_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = tmp_path / "picky_method.py"
    plugin.write_text(PICKY)
    command = [
        "check",
        "picky",
        "--plugin",
        str(plugin),
        "--families",
        "bert",
        "--precisions",
    ]
    assert main([*command, "fp32 nf4"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["BEHAVIOUR", "BERT", "FP32", "BERT", "NF4"]
    assert lines[0].split() == ["starts", "at", "the", "base", "–", "–"]
    assert lines[-1].startswith(
        "– bert: everything: picky: width 64 is not enough for these layers."
    )
    assert main([*command, "fp32", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["error"] for row in rows} == {None}
    assert all(row["refused"] for row in rows)


def test_check_fails_where_something_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(case: Any) -> None:
        raise AssertionError("two words")

    def sees_both(case: Any) -> None:
        assert case.attach(case.base()).arguments == {"lora": {"rank": 3}, "ia3": {}}

    monkeypatch.setattr(
        "petune.testing.BEHAVIOURS", {"one": broken, "two": lambda case: None}
    )
    assert (
        main(["check", "lora", "--families", "bert llama", "--precisions", "fp32"]) == 1
    )
    said = capsys.readouterr()
    assert said.out.splitlines()[1:] == [
        "one        ✗          ✗",
        "two        ✓          ✓",
    ]
    assert said.err == "✗ bert, llama: one: AssertionError: two words\n"
    monkeypatch.setattr("petune.testing.BEHAVIOURS", {"both": sees_both})
    assert (
        main(
            ["check", "lora+ia3", "--families", "bert", "--argument", "lora={rank: 3}"]
        )
        == 0
    )


def test_train_again_asks_first(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", file]) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    assert "The run is in" in shown
    assert main(["train", file]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["train", file, "--overwrite"]) == 0
    assert main(["train", file, "--resume"]) == 0


def test_a_single_file_plugin(
    plugin: str, file: str, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["methods", "--plugin", plugin]) == 0
    assert "scale: float = 2.0" in capsys.readouterr().out
    assert (
        main(
            [
                "train",
                file,
                "method=shift",
                "method_args={scale: 1}",
                f"--plugin={plugin}",
            ]
        )
        == 0
    )
    assert main(["eval", recipe["output"], "--plugin", plugin]) == 0
    capsys.readouterr()
    assert main(["hello", "--name", "there", "--plugin", plugin]) == 0
    assert capsys.readouterr().out == "hello there\n"


def test_an_interrupted_run_says_how_to_go_on(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from petune.training.recorder import Recorder

    begin = Recorder.on_step_begin

    def interrupt(
        self: Recorder, args: Any, state: Any, control: Any, **more: Any
    ) -> None:
        begin(self, args, state, control, **more)
        self.stopping = state.global_step == 2

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_begin", interrupt)
        assert main(["train", file]) == 130
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "stopped at step 3 of 6; --resume goes on." in said[0]
    assert main(["train", file, "--resume"]) == 0


def test_install_is_pips(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from petune.cli import environment

    asked: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        asked.append(command[1:])
        return subprocess.CompletedProcess(command, len(asked) - 1)

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["install", "petune-x", "--upgrade"]) == 0
    assert asked == [["-m", "pip", "install", "petune-x", "--upgrade"]]
    assert main(["uninstall", "petune-x"]) == 2
    assert asked[1] == ["-m", "pip", "uninstall", "--yes", "petune-x"]
    assert "pip uninstall failed (exit code 1)" in capsys.readouterr().err
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    assert main(["install", "petune-x"]) == 2
    assert "this environment has no pip: run `uv pip install" in capsys.readouterr().err


def test_output_into_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m petune.cli methods | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=os.environ
    )
    assert done.stdout.startswith("METHOD")
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
