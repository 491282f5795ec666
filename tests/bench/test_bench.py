"""`petune bench` from the command line, on models of a few thousand parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from petune.cli import main

KEYS = """
schema_version suite cell status error model precision method method_args implementation task data seed steps
trainable_params adapter_bytes score metric train_loss step_seconds tokens_per_second peak_memory_bytes
saved_activation_bytes load_seconds eval_seconds device environment
"""

PLUGIN = '''
import torch
from torch import nn
import petune

class Gate(petune.Adapter):
    """y = W x * exp(s)."""
    where = petune.ALL_LINEAR
    def __init__(self, site, *, start: float = 0.0):
        super().__init__()
        if start > 9:
            raise petune.UnsupportedError("start is too far out.")
        self.s = nn.Parameter(torch.full((site.out_features,), start))
    def forward(self, inner, x):
        return inner(x) * self.s.exp()

class Broken(Gate):
    """Fails when it runs."""
    def forward(self, inner, x):
        raise RuntimeError("two lines\\nof a reason")

class Deadly(Gate):
    """Takes its process with it, as a full memory does."""
    def forward(self, inner, x):
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)

class Hungry(Gate):
    """Asks for more memory than there is."""
    def forward(self, inner, x):
        return inner(x) + torch.empty(1 << 60)

@petune.hookimpl
def petune_methods():
    return {"gate": Gate, "broken": Broken, "deadly": Deadly, "hungry": Hungry}
'''


@pytest.fixture
def plugin(tmp_path: Path, single_files: None) -> str:
    file = tmp_path / "gates.py"
    file.write_text(PLUGIN)
    return str(file)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
def test_several_methods_in_a_cell(tmp_path: Path, suite: Any) -> None:
    cell = {
        "method": ["prefix-tuning", "ia3"],
        "method_args": {"prefix-tuning": {"length": 3}},
        "where": {"ia3": "k"},
    }
    assert main(["bench", suite(cell), "--out", str(tmp_path / "out")]) == 0
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert (row["cell"], row["method"], row["status"]) == (
        "prefix-tuning+ia3",
        "prefix-tuning+ia3",
        "ok",
    )
    assert row["method_args"] == {"prefix-tuning": {"length": 3}}
    bad = suite({**cell, "method_args": {"prefix-tunign": {}}})
    assert main(["bench", bad, "--out", str(tmp_path / "bad")]) == 2


def test_each_cell_has_its_row_and_its_place_in_the_report(
    suite, plugin, tmp_path, capsys
):
    cells = [
        {"method": "gate", "precision": "nf4"},
        {"method": "lora", "method_args": {"rank": 2}},
        {"method": "lora", "method_args": {"rank": 2}, "implementation": "peft"},
        {"method": "houlsby", "implementation": "peft"},
        {"method": "adalora", "implementation": "peft"},
        {"name": "too far", "method": "gate", "method_args": {"start": 10.0}},
        {"method": "broken"},
        {"method": "deadly"},
        {"method": "hungry"},
    ]
    out = tmp_path / "out"
    assert main(["bench", suite(*cells), "--out", str(out), "--plugin", plugin]) == 1
    printed = capsys.readouterr()

    rows = {row["cell"]: row for row in rows_of(out)}
    assert all(list(row) == KEYS.split() for row in rows.values())
    assert {name: row["status"] for name, row in rows.items()} == {
        "gate": "ok", "lora": "ok", "lora (peft)": "ok", "houlsby (peft)": "unsupported",
        "adalora (peft)": "unsupported", "too far": "unsupported", "broken": "failed", "deadly": "oom", "hungry": "oom",
    }  # fmt: skip
    assert rows["broken"]["error"] == "RuntimeError: two lines of a reason"
    assert "SIGKILL" in rows["deadly"]["error"]
    assert rows["gate"]["precision"] == "nf4"
    assert rows["lora (peft)"]["implementation"] == "peft"
    assert rows["lora (peft)"]["trainable_params"] == rows["lora"]["trainable_params"]
    for name in ("gate", "lora", "lora (peft)"):
        row = rows[name]
        assert 0 <= row["score"] <= 1
        assert row["steps"] == 3
        assert (
            min(
                row[key]
                for key in (
                    "adapter_bytes",
                    "peak_memory_bytes",
                    "saved_activation_bytes",
                )
            )
            > 0
        )
        known = {
            "python",
            "torch",
            "transformers",
            "peft",
            "bitsandbytes",
            "petune",
            "cpu",
            "cores",
        }
        assert known <= row["environment"].keys()

    page = (out / "report.html").read_text()
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", page)
    assert "http" not in page.replace("http-equiv", "")
    for name, row in rows.items():
        assert name in page
        assert name in printed.out
        if row["status"] != "ok":
            assert row["error"].partition("'")[0] in page
    assert (out / "report.png").stat().st_size > 0
    assert max(len(line) for line in printed.out.splitlines()) < 300


def test_a_second_run_does_only_what_is_missing(suite, plugin, tmp_path, capsys):
    out = tmp_path / "out"
    command = [
        "bench",
        suite({"method": "ia3"}, {"method": "bitfit"}),
        "--out",
        str(out),
        "--plugin",
        plugin,
    ]
    assert main([*command, "--cells", "ia3"]) == 0
    (done,) = rows_of(out)
    capsys.readouterr()
    with (out / "results.jsonl").open("a") as file:
        file.write('{"half a li')  # as a crash leaves it

    assert main([*command, "--json"]) == 0
    assert [row["cell"] for row in json.loads(capsys.readouterr().out)] == [
        "ia3",
        "bitfit",
    ]
    lines = (out / "results.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == done
    assert [json.loads(line)["cell"] for line in lines[1:]] == ["bitfit"]


def test_another_configuration_and_another_seed_run_and_methods_can_be_added(
    suite, plugin, tmp_path, capsys
):
    out = tmp_path / "out"
    path = suite({"method": "ia3"})
    assert main(["bench", path, "--out", str(out), "--seeds", "2"]) == 0
    path = suite({"method": "ia3", "training": {"learning_rate": 0.5}})
    extra = ["--method", "gate start=0.5 learning_rate=1e-2", "--plugin", plugin]
    assert main(["bench", path, "--out", str(out), *extra]) == 0
    rows = [(row["cell"], row["seed"]) for row in rows_of(out)]
    assert rows == [
        ("ia3", 0),
        ("ia3", 1),
        ("ia3", 0),
        ("gate start=0.5 learning_rate=1e-2", 0),
    ]
    assert rows_of(out)[-1]["method_args"] == {"start": 0.5}
    assert rows_of(out)[-1]["environment"]["training"]["learning_rate"] == 0.01
    assert (
        "seeds)" not in (out / "report.html").read_text()
    )  # the rows of another learning rate are not averaged in
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quickstrat"], "unknown suite 'quickstrat'. Did you mean 'quickstart'?"),
        (["nowhere.yaml"], "nowhere.yaml: No such file"),
        (["quickstart", "--method", "lroa"], "Did you mean 'lora'"),
        (["quickstart", "--method", "lora rnak=4"], "Did you mean 'rank'?"),
        (["quickstart", "--cells", "lroa"], "Did you mean 'lora'"),
        (["quickstart", "--executor", "clowd"], "unknown executor 'clowd'"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(arguments, said, tmp_path, capsys):
    assert main(["bench", *arguments, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cells": [{"methd": "lora"}]}, "Did you mean 'cells.0.method'"),
        ({"cells": [{"method": "lora"}], "sedes": [1]}, "Did you mean 'seeds'"),
        ({"cells": []}, "cells"),
        (
            {"cells": [{"method": "lora"}, {"method": "lora"}]},
            "two cells are called 'lora'",
        ),
        (
            {"cells": [{"method": "lora", "training": {"setps": 1}}]},
            "Did you mean 'training.steps'",
        ),
        (
            {"cells": [{"method": "lora", "precision": "nf5"}]},
            "unknown precision 'nf5'",
        ),
        (
            {"cells": [{"method": "lora"}], "defaults": {"modle": "x"}},
            "Did you mean 'defaults.model'",
        ),
    ],
)
def test_a_mistake_in_a_suite_names_file_key_and_the_nearest(
    values, said, defaults, tmp_path, capsys
):
    import yaml

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"defaults": defaults, **values}))
    assert main(["bench", str(path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert str(path) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_quickstart_lora_learns(tmp_path):
    assert main(["bench", "quickstart", "--cells", "lora", "--out", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path)
    assert row["precision"] == "nf4"
    assert row["score"] >= 0.78
