"""Every mistake of a user's ends in one line on stderr that names it, with exit code 2."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from samples import jsonl, opinions

from petune.cli import main


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("petune: ")
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["unknown command 'trian'", "Did you mean 'train'"]),
        (["methods", "--jsno"], ["unknown option '--jsno'", "'--json'"]),
        (["train"], ["Missing argument 'RECIPE.yaml'"]),
        (["predict", "run"], ["Missing option '--data'"]),
        (["methods", "extra"], ["unexpected extra argument"]),
        (["methods", "--plugin", "nowhere.py"], ["--plugin nowhere.py: no such file"]),
        (["methods", "--plugin"], ["--plugin: name a Python file"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml: No such file"]),
        (["eval", "nowhere"], ["nowhere: no run"]),
        (["sites", "./nowhere"], ["./nowhere: no such file"]),
    ],
)
def test_on_the_command_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]
) -> None:
    said = complaint(capsys, *argv)
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method=lroa", ["unknown method 'lroa'", "'lora'"]),
        ("method_args.rnak=3", ["'rnak'", "'rank'"]),
        ("method_args.rank=big", ["rank='big'"]),
        (
            "method_args.rank=-1",
            ["method 'lora': rank=-1: Input should be greater than 0"],
        ),
        ("where=nowhere", ["nowhere"]),
        ("task=clasification", ["unknown task 'clasification'", "'classification'"]),
        ("precision=nf5", ["'nf5'", "'nf4'"]),
        ("model=./nowhere", ["./nowhere"]),
        ("data=nowhere.jsonl", ["nowhere.jsonl: no such file"]),
        ("data=vader-movis", ["'vader-movis'", "'vader-movies'"]),
        ("columns.text=sentense", ["opinions.jsonl", "'sentense'", "'sentence'"]),
        ("columns.labl=gold", ["'labl'", "'label'"]),
        ("training.steps=ten", ["training.steps: 'ten' should be a valid integer"]),
        ("training.stpes=10", ["unknown key 'training.stpes'", "'training.steps'"]),
        ("training.schedule=cosin", ["training.schedule", "'cosine'"]),
        ("trainig.steps=10", ["unknown key 'trainig'", "'training'"]),
        ("steps", ["write key=value"]),
    ],
)
def test_in_a_recipe(
    capsys: pytest.CaptureFixture[str], file: str, override: str, words: list[str]
) -> None:
    said = complaint(capsys, "train", file, override)
    for word in words:
        assert word in said


def test_a_model_without_the_head_that_the_task_needs(
    capsys: pytest.CaptureFixture[str], file: str
) -> None:
    assert "causal" in complaint(capsys, "train", file, "head=causal").lower()


def test_rows_without_the_column(
    capsys: pytest.CaptureFixture[str],
    file: str,
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    assert main(["train", file]) == 0
    data = jsonl(tmp_path / "other.jsonl", [{"text": "good"}])
    said = complaint(capsys, "predict", recipe["output"], "--data", str(data))
    assert "other.jsonl" in said
    assert "unknown column 'sentence'" in said
    data = jsonl(
        tmp_path / "unlabelled.jsonl",
        [{"sentence": row["sentence"]} for row in opinions(3)],
    )
    assert "unknown column 'gold'" in complaint(
        capsys, "eval", recipe["output"], "--data", str(data)
    )
    assert "nowhere.jsonl: no such file" in complaint(
        capsys, "predict", recipe["output"], "--data", "nowhere.jsonl"
    )


def test_a_broken_plugin_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "rotten.py"
    path.write_text("import nothing_of_that_name")
    assert "No module named 'nothing_of_that_name'" in complaint(
        capsys, "methods", "--plugin", str(path)
    )


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nowhere.yaml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_of_ours_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("no good")

    monkeypatch.setattr("petune.cli.app.COMMANDS", {"broken": broken})
    assert main(["broken"]) == 1
    assert (
        capsys.readouterr().err
        == "petune: RuntimeError: no good (--debug shows where.)\n"
    )
    assert main(["broken", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["trian"], ["train", "nowhere.yaml"]])
def test_as_a_process(argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "petune.cli", *argv], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
