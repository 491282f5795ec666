"""What is typed: options that are given twice, YAML of any shape; and what is said: names, losses, advice."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from petune.cli import main
from petune.cli.runs import LOST
from petune.core.attached.cost import Merged
from petune.errors import listed, unknown
from petune.testing.rows import Row
from petune_bench import matrix
from petune_bench.options import Parser
from petune_bench.runner import run as bench


def said_by(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a command says on stderr; it ends with 2."""
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("petune: ")
    assert len(line) < 500
    return line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["eval", "run", "--data", "a", "--data", "b"], "--data is given twice"),
        (["predict", "run", "--data=a", "--out", "b", "--out=c"], "--out is given twice"),
        (["export", "run", "out", "--format", "peft", "--format=dense"], "--format is given twice"),
        (["sites", "m", "--head", "base", "--head", "causal-lm"], "--head is given twice"),
        (["check", "lora", "--device", "cpu", "--device", "cpu"], "--device is given twice"),
        (["check", "lora", "--argument", "rank=2", "--argument", "rank=4"], "'rank' is given twice"),
        (["check", "lora", "--argument", "rank"], "write KEY=VALUE"),
        (["check", "lora", "--device", "tpu"], "unknown device 'tpu'. Did you mean 'cpu'"),
        (["check", "lora", "--device", "CPU"], "Did you mean 'cpu'"),
        (["check", "lora", "--device", "cpu:7"], "--device cpu:7: this machine has cpu"),
        (["export", "run", "out", "--format", "PEFT"], "Did you mean 'peft'"),
        (["check", "LoRA"], "Did you mean 'lora'?"),
        (["bench", "quickstart", "--seeds", "1", "--seeds", "2"], "--seeds is given twice"),
        (["bench", "quickstart", "--out", "a", "--out", "b"], "--out is given twice"),
        (["bench", "quickstart", "--method", "lora rank=2 rank=4"], "'rank' is given twice"),
        (["bench", "quickstart", "--cells", "lora", "--cells", "nothing*"], "unknown cell 'nothing*'"),
    ],
)  # fmt: skip
def test_what_an_option_can_not_be_is_refused(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert words in said_by(capsys, *argv)


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.steps=1", "training.steps=2"],
        ["training.steps=1", "training={batch_size: 2}"],
        ["training={batch_size: 2}", "training.steps=1"],
    ],
)
def test_an_override_that_is_given_twice_is_refused(
    capsys: pytest.CaptureFixture[str], file: str, overrides: list[str]
) -> None:
    assert "is given already" in said_by(capsys, "train", file, *overrides)


def test_words_that_are_given_twice_mean_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[Any] = []

    def kit(method: str, **where: Any) -> list[Row]:
        asked.append((where["families"], where["precisions"]))
        return [Row("runs", "llama", "fp32")]

    monkeypatch.setattr("petune.testing.run_checks", kit)
    argv = [
        "check",
        "lora",
        "--families",
        "llama",
        "--families=bert llama",
        "--precisions",
        "fp32",
    ]
    assert main(argv) == 0
    assert main(["check", "lora"]) == 0
    assert asked == [
        (["llama", "bert"], ["fp32"]),
        (["llama", "gpt2", "bert", "t5"], ["fp32", "nf4"]),
    ]
    argv = ["--methods", "bitfit", "--methods=ln-tuning bitfit", "--families", "llama", "--precisions", "fp32",
            "--results", str(tmp_path / "rows.jsonl")]  # fmt: skip
    assert matrix.main(argv) == 0
    assert "2 cells, 0 failures" in capsys.readouterr().out


def test_the_programs_beside_refuse_one_value_twice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        matrix.main(["--device", "cpu", "--device", "cuda"])
    assert stop.value.code == 2
    assert "--device is given twice; give it once." in capsys.readouterr().err
    parser = Parser()
    parser.add_argument("files", nargs="*")
    parser.add_argument("--words", action="words", default=["a"])
    assert parser.parse_args(["x", "y"]).words == ["a"]
    given = parser.parse_args(["x", "y", "--words", "b c", "--words", "c"])
    assert (given.files, given.words) == (["x", "y"], ["b", "c"])


def test_cells_by_several_patterns(
    suite: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["lora", "ia3", "bitfit"]
    path = suite(*({"method": name} for name in names))
    asked: list[str] = []
    monkeypatch.setitem(
        bench.__globals__["EXECUTORS"],
        "local",
        lambda cells, *_: iter([asked.append(cell.name) for cell in cells][:0]),
    )
    bench(path, out=tmp_path / "out", cells=["lo*", "bitfit"])
    assert asked == ["lora", "bitfit"]


DEEP = "[" * 20_000 + "]" * 20_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"model: {DEEP}", "nested too deeply"),
        ("model: 2026-13-45", "month must be in 1..12"),
        ("? [a]\n: 3", "unhashable key"),
        ("1: 3", "key 1 should be a word"),
        ("model: m\n---\nmodel: n", "another document"),
        ("model: !!python/object:os.system x", "could not determine a constructor"),
        ("model: \x08", "not YAML"),
        ("model: &a [x, *a]", "model: "),
        ("model: " + str([["x"] * 50] * 50), "model: "),
        ("model: m\ntask: t\ndata: d\noutput: o\ntraining: &t {schedule_args: *t}", "training.schedule_args"),
    ],
)  # fmt: skip
def test_yaml_of_any_shape(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    said = said_by(capsys, "train", str(path))
    assert str(path) in said
    assert words in said


def test_yaml_on_the_command_line_and_of_a_suite(
    capsys: pytest.CaptureFixture[str], file: str, tmp_path: Path
) -> None:
    assert "is not a YAML value" in said_by(
        capsys, "train", file, f"method_args.rank={DEEP}"
    )
    assert "is not a YAML value" in said_by(
        capsys, "check", "lora", "--argument", "rank=["
    )
    (tmp_path / "deep.yaml").write_text(f"cells: {DEEP}")
    assert "nested too deeply" in said_by(capsys, "bench", str(tmp_path / "deep.yaml"))


def test_messages_name_four_names() -> None:
    names = ["steps", "seed", "epochs", "batch_size", "schedule", "warmup"]
    assert unknown("key", "stpes", names) == (
        "unknown key 'stpes'. Did you mean 'steps'? Known: batch_size, epochs, schedule, steps, …"
    )
    assert unknown("key", "x", names[:2]) == "unknown key 'x'. Known: seed, steps."
    assert unknown("key", "x", []) == "unknown key 'x'. Known: none."
    assert listed(names) == "steps, seed, epochs, batch_size, …"
    assert listed(names[:4]) == "steps, seed, epochs, batch_size"


def test_a_merge_that_loses_what_was_tuned_says_so(
    capsys: pytest.CaptureFixture[str], recipe: dict[str, Any], tmp_path: Path
) -> None:
    from petune.training import train

    # a rate so low that 4 bits of a weight have no place for what it changes
    small = {**recipe, "precision": "nf4", "where": "q v",
             "training": {**recipe["training"], "learning_rate": 1e-6}}  # fmt: skip
    train(small, quiet=True, final_eval=False)
    capsys.readouterr()
    assert (
        main(["merge", recipe["output"], str(tmp_path / "quantized"), "--quantized"])
        == 0
    )
    said = capsys.readouterr().err
    assert "times as large as what was tuned" in said
    assert main(["merge", recipe["output"], str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().err == ""


def test_what_a_merge_loses_is_the_mean_over_its_layers() -> None:
    assert Merged({"a": 0.1, "b": 0.1}, {"a": 0.2, "b": 1.0}).loss == pytest.approx(0.6)
    assert Merged().loss == 0.0 < LOST


def test_a_merge_is_not_advised_where_there_is_none(
    capsys: pytest.CaptureFixture[str], recipe: dict[str, Any], tmp_path: Path
) -> None:
    from petune.training import train

    tuned = {**recipe, "method": "houlsby", "method_args": {}}
    train(tuned, quiet=True, final_eval=False)
    for format in ("peft", "serving"):
        argv = ("export", recipe["output"], str(tmp_path / format), "--format", format)
        assert "merge" not in said_by(capsys, *argv)
    assert "no merged form" in said_by(
        capsys, "merge", recipe["output"], str(tmp_path / "merged")
    )


def test_a_place_that_is_taken_is_said_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], file: str
) -> None:
    for command in ("merge", "export"):
        assert "exists already" in said_by(capsys, command, "nowhere", file)
        assert "is a file" in said_by(capsys, command, "nowhere", f"{file}/out")


def test_output_that_a_disk_does_not_take() -> None:
    command = f"{sys.executable} -m petune.cli --version >/dev/full"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "petune: standard output: No space left on device.\n"
