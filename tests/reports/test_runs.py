"""Runs that go on, diverge, find another file than they left, or come to the end of a disk."""

import errno
import json
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from datasets import Dataset
from samples import changed, jsonl, opinions, same_weights, weights

import petune
from petune import PetuneError, UnmergeableError
from petune.cli import main
from petune.errors import PetuneWarning
from petune.training import evaluate, load_recipe, load_run, predict, train
from petune.training.health import trouble
from petune.training.processes import Processes
from petune.training.recorder import Recorder
from petune.training.setup import make_task

PLUGIN = '''
import petune, torch

class Shift(petune.Adapter):
    """y + s"""

    where = "q"

    def __init__(self, site):
        super().__init__()
        self.s = torch.nn.Parameter(torch.zeros(site.out_features))

    def forward(self, inner, x):
        return inner(x) + self.s

@petune.hookimpl
def petune_methods():
    return {"shift": Shift}
'''


def run_of(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    return {**recipe, "output": str(Path(recipe["output"]).with_name(name))}


def refusal(recipe: dict[str, Any], **how: bool) -> str:
    with pytest.raises(PetuneError) as error:
        train(recipe, quiet=True, **how)
    said = str(error.value)
    assert "\n" not in said
    assert error.value.exit_code == 2
    return said


def said_by(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """The one line that a command says on stderr."""
    capsys.readouterr()
    assert main(argv) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("petune: ")
    return line


@pytest.mark.parametrize(
    ("schedule", "same"),
    [("constant", True), ("inverse_sqrt", True), ("linear", False)],
)
def test_a_finished_run_trains_on(
    recipe: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    schedule: str,
    same: bool,
) -> None:
    recipe = changed(recipe, schedule=schedule)
    whole, grown = run_of(recipe, "whole"), run_of(recipe, "grown")
    train(changed(whole, steps=7), quiet=True, final_eval=False)
    train(changed(grown, steps=3), quiet=True, final_eval=False)
    result = train(changed(grown, steps=7), quiet=True, resume=True, final_eval=False)
    assert result.steps == 7
    assert same_weights(weights(whole["output"]), weights(grown["output"])) is same
    remarks = [
        record.message for record in caplog.records if "3 steps" in record.message
    ]
    assert len(remarks) == (0 if same else 1)
    if not same:
        assert "'linear' of 3 steps, not that of 7" in remarks[0]


def test_the_rates_of_a_run_that_trains_on_are_those_of_its_new_schedule(
    recipe: dict[str, Any],
) -> None:
    train(changed(recipe, steps=2), quiet=True, final_eval=False)
    train(
        changed(recipe, steps=6, log_every=1), quiet=True, resume=True, final_eval=False
    )
    logged = [
        json.loads(line)
        for line in (Path(recipe["output"]) / "metrics.jsonl").read_text().splitlines()
    ]
    rates = {row["step"]: row["learning_rate"] for row in logged}
    expected = {step: 1e-2 * (1 - (step - 1) / 6) for step in (3, 4, 5, 6)}
    assert {step: rates[step] for step in expected} == pytest.approx(expected)


def test_a_run_that_has_gone_further_and_one_without_a_checkpoint(
    recipe: dict[str, Any],
) -> None:
    train(recipe, quiet=True)
    assert "has trained 6 steps and the recipe asks for 2" in refusal(
        changed(recipe, steps=2), resume=True
    )
    assert train(recipe, quiet=True, resume=True).steps == 6
    shutil.rmtree(Path(recipe["output"]) / "checkpoints")
    assert "no checkpoint to go on from" in refusal(
        changed(recipe, steps=9), resume=True
    )
    assert "exclude each other" in refusal(recipe, resume=True, overwrite=True)


def test_data_that_has_changed(recipe: dict[str, Any]) -> None:
    train(recipe, quiet=True)
    before = weights(recipe["output"])
    jsonl(Path(recipe["data"]), opinions(80))
    said = refusal(changed(recipe, steps=9), resume=True)
    assert "the split 'train' is another (it has 64 rows, and had 48)" in said
    assert "has changed" in refusal(recipe, resume=True)
    with pytest.raises(PetuneError, match=r"the split 'test' is another.*--data"):
        evaluate(recipe["output"])
    assert 0 <= evaluate(recipe["output"], recipe["data"])["accuracy"] <= 1
    # the same number of rows, one of them another
    jsonl(Path(recipe["data"]), [*opinions(59), {"sentence": "good", "gold": "neg"}])
    assert "has changed" in refusal(changed(recipe, steps=9), resume=True)
    jsonl(Path(recipe["data"]), opinions(60))
    assert train(changed(recipe, steps=9), quiet=True, resume=True).steps == 9
    assert not same_weights(before, weights(recipe["output"]))


def test_a_refusal_loses_nothing_that_was_to_be_overwritten(
    recipe: dict[str, Any],
) -> None:
    train(recipe, quiet=True)
    kept = weights(recipe["output"])
    jsonl(Path(recipe["data"]), [{**row, "gold": "same"} for row in opinions(60)])
    assert "1 different labels" in refusal(recipe, overwrite=True)
    assert same_weights(kept, weights(recipe["output"]))


def damage(path: Path, how: str) -> None:
    if how == "gone":
        path.unlink()
    else:
        content = {"cut": path.read_bytes()[:60], "empty": b"", "other": b'{"a": 1}'}[
            how
        ]
        path.write_bytes(content)


def test_a_damaged_checkpoint(recipe: dict[str, Any]) -> None:
    train(recipe, quiet=True, final_eval=False)
    run = Path(recipe["output"])
    kept = shutil.copytree(run, run.with_name("kept"))
    files = (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "clock.json",
        "adapter/adapter.safetensors",
    )
    for name in files:
        for how in ("cut", "empty", "gone", "other"):
            shutil.rmtree(run)
            shutil.copytree(kept, run)
            path = run / "checkpoints" / "checkpoint-6" / name
            damage(path, how)
            assert str(path) in refusal(changed(recipe, steps=8), resume=True)


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_checkpoint_that_is_passed_over_is_said(
    recipe: dict[str, Any], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    train(changed(recipe, checkpoint_every=3), quiet=True, final_eval=False)
    run = Path(recipe["output"])
    expected = weights(recipe["output"])
    for step, begins in ((6, "goes on from step 3"), (3, "begins anew")):
        (run / "result.json").unlink()
        shutil.rmtree(run / "adapter")
        newest = run / "checkpoints" / "checkpoint-6"
        damage(newest.with_name(f"checkpoint-{step}") / "trainer_state.json", how)
        if step == 3:
            damage(newest / "trainer_state.json", how)
        caplog.clear()
        asked = changed(recipe, checkpoint_every=3)
        train(asked, quiet=True, resume=True, final_eval=False)
        assert caplog.messages == [f"{newest}: is not whole; the run {begins}."]
        assert same_weights(weights(recipe["output"]), expected)


def test_an_adapter_without_a_checkpoint_is_not_trained_over(
    recipe: dict[str, Any],
) -> None:
    train(recipe, quiet=True, final_eval=False)
    run, kept = Path(recipe["output"]), weights(recipe["output"])
    shutil.rmtree(run / "checkpoints")
    (run / "result.json").unlink()
    said = refusal(changed(recipe, steps=8), resume=True)
    assert said.endswith("no checkpoint to go on from; --overwrite trains it anew.")
    assert same_weights(weights(recipe["output"]), kept)


def test_rows_of_the_log_that_are_no_text_are_dropped(recipe: dict[str, Any]) -> None:
    train(recipe, quiet=True, final_eval=False)
    log = Path(recipe["output"]) / "metrics.jsonl"
    whole = log.read_text()
    log.write_bytes(log.read_bytes() + b"\x00\xff{[")
    train(changed(recipe, steps=8), quiet=True, resume=True, final_eval=False)
    assert log.read_text().startswith(whole)
    assert "\ufffd" not in log.read_text()


def test_rows_without_a_column_are_not_told_of_a_recipe(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    train(recipe, quiet=True, final_eval=False)
    data = jsonl(tmp_path / "asked.jsonl", [{"phrase": "good film"}])
    with pytest.raises(
        PetuneError, match=r"'sentence'\. Known: phrase\. It plays 'text'"
    ):
        predict(recipe["output"], data)
    recipe |= {"columns": {}, "output": str(tmp_path / "plain")}
    named = [{"text": row["sentence"], "label": row["gold"]} for row in opinions(60)]
    jsonl(Path(recipe["data"]), named)
    train(recipe, quiet=True, final_eval=False)
    with pytest.raises(PetuneError, match=r"'text'\. Known: phrase\. It plays 'text'"):
        predict(recipe["output"], data)


def test_a_token_that_the_model_has_no_embedding_for(
    recipe: dict[str, Any], encoder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(encoder, tmp_path / "model")
    tokenizer = petune.load_tokenizer(model)
    tokenizer.add_tokens(["blockbuster"])
    tokenizer.save_pretrained(model)
    train({**recipe, "model": str(model)}, quiet=True, final_eval=False)
    with pytest.raises(PetuneError, match=r"has token .* \('blockbuster'\), and"):
        predict(recipe["output"], [{"sentence": "a blockbuster"}])


def test_answers_do_not_take_the_place_of_the_rows(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe, quiet=True, final_eval=False)
    data = Path(recipe["data"])
    before = data.read_bytes()
    link = tmp_path / "link.jsonl"
    link.symlink_to(data)
    for out in (data, link):
        words = ["predict", recipe["output"], "--data", str(data), "--out", str(out)]
        assert "holds the rows to answer" in said_by(capsys, *words)
    assert data.read_bytes() == before


def test_a_checkpoint_of_another_optimizer_is_named(recipe: dict[str, Any]) -> None:
    train(recipe, quiet=True, final_eval=False)
    checkpoint = Path(recipe["output"]) / "checkpoints" / "checkpoint-6"
    torch.save({"state": {}, "param_groups": []}, checkpoint / "optimizer.pt")
    said = refusal(changed(recipe, steps=8), resume=True)
    assert f"{checkpoint}: can't be gone on from" in said


@pytest.mark.parametrize("rate", [1e6, 1e30])
def test_a_run_that_diverges_says_so_and_keeps_its_last_finite_checkpoint(
    recipe: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rate: float,
) -> None:
    recipe = changed(recipe, steps=30, learning_rate=rate, checkpoint_every=1, optimizer="sgd",
                     max_grad_norm=0, schedule="constant")  # fmt: skip
    (tmp_path / "astray.yaml").write_text(yaml.safe_dump(recipe))
    said = said_by(capsys, "train", str(tmp_path / "astray.yaml"), code=1)
    assert "diverged" in said
    assert "training.learning_rate" in said
    run = Path(recipe["output"])
    assert not (run / "adapter").exists()
    assert not (run / "result.json").exists()
    for folder in (run / "checkpoints").glob("checkpoint-*"):
        for tensor in safetensors.torch.load_file(
            folder / "adapter" / "adapter.safetensors"
        ).values():
            assert tensor.isfinite().all()
        assert str(folder.parent) in said


def test_a_loss_that_has_risen_beyond_all_measure(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "metrics.jsonl", None, 1, Processes())  # type: ignore[arg-type]
    recorder.first_loss, recorder.loss = 0.7, 90.0
    assert recorder.went_astray is None
    recorder.loss = 101.0
    assert recorder.went_astray == "its loss has risen from 0.7 to 101"
    recorder.first_loss = 2.0
    assert recorder.went_astray is None


@pytest.mark.parametrize(
    ("rate", "method", "words"),
    [
        (1e6, "lora", "the model answers every row alike"),
        (1e6, "full", "the model answers every row alike"),
        (1e-2, "prefix-tuning", None),
        (1e-2, "lora", None),
        (1e-12, "lora", None),
        (0.3, "lora", None),
    ],
)
def test_a_model_that_ends_dead_at_a_finite_loss_is_told_from_others(
    generation: dict[str, Any], rate: float, method: str, words: str | None
) -> None:
    asked = {**generation, "method": method, "method_args": {}}
    asked = changed(asked, learning_rate=rate, steps=12)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = train(asked, quiet=True)
    assert math.isfinite(result.train_loss)
    lines = [str(one.message) for one in said if one.category is PetuneWarning]
    where = f"{generation['output']}: after the training {words}."
    expected = f"{where} Lower training.learning_rate ({rate:g})."
    assert lines == ([expected] if words else [])


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((0.7, 3.1, None), "the loss has risen from 0.7 to 3.1"),
        ((2.0, 6.1, 2.0), "the loss has risen from 2 to 6.1"),
        ((0.7, 0.0, 10.5), "the loss on the test split is 10.5, where the first"),
        ((0.01, 2.9, 9.9), None),
        ((2.5, 7.4, 24.0), None),
        ((None, 50.0, 50.0), None),
        ((0.7, float("nan"), None), None),
    ],
)
def test_losses_that_no_healthy_run_ends_with(
    recipe: dict[str, Any],
    encoder: Path,
    losses: tuple[float | None, float, float | None],
    words: str | None,
) -> None:
    task = make_task(load_recipe(recipe))
    task.fit(Dataset.from_list([{"text": "a", "label": x} for x in ("neg", "pos")]))
    model = petune.from_pretrained(encoder, head=task.head, **task.model_args())
    rows = [{"text": text, "label": "neg"} for text in ("good film", "bad film")]
    found = trouble(model, task, [task.encode(row) for row in rows], losses)
    assert (found or "").startswith(words or "")
    assert bool(found) == bool(words)


def test_a_loss_that_is_no_number_from_the_start(
    recipe: dict[str, Any], encoder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(encoder, tmp_path / "model")
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"].fill_(3e38)
    safetensors.torch.save_file(tensors, model / "model.safetensors", {"format": "pt"})
    said = refusal({**recipe, "model": str(model)})
    assert "the loss was nan before anything was trained" in said


@pytest.mark.parametrize(
    "state", ['{"labels": 3}', '{"labels": null}', "{}", "[", "[1]"]
)
def test_a_task_that_is_not_what_the_run_left(
    recipe: dict[str, Any], state: str
) -> None:
    train(recipe, quiet=True, final_eval=False)
    path = Path(recipe["output"]) / "task.json"
    path.write_text(state)
    with pytest.raises(PetuneError, match=r"task\.json: "):
        load_run(recipe["output"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "[1]"),
        ("tokenizer.json", '{"a": 1}'),
        ("tokenizer_config.json", "[1]"),
    ],
)
def test_a_damaged_tokenizer(
    recipe: dict[str, Any], encoder: Path, tmp_path: Path, name: str, content: str
) -> None:
    model = shutil.copytree(encoder, tmp_path / "model")
    (model / name).write_text(content)
    assert f"{model}: " in refusal({**recipe, "model": str(model)})


@pytest.fixture
def shift(tmp_path: Path, recipe: dict[str, Any], single_files: None) -> Path:
    """A run of a method that a single file brings; the file."""
    from petune.core.registry.plugins import registry

    path = tmp_path / "shift.py"
    path.write_text(PLUGIN)
    registry().add_file(path)
    train({**recipe, "method": "shift", "method_args": {}}, quiet=True)
    registry.cache_clear()
    return path


def test_a_run_brings_back_the_plugin_that_it_was_trained_with(
    recipe: dict[str, Any], shift: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from petune.core.registry.plugins import registry

    asked = predict(recipe["output"], [{"sentence": "good day"}])
    assert asked[0]["prediction"] in ("neg", "pos")
    with pytest.raises(UnmergeableError, match="'shift' has no merged form"):
        load_run(recipe["output"]).merge(shift.with_name("merged"))
    registry.cache_clear()
    shift.write_text(PLUGIN + "# another")
    said = said_by(capsys, "eval", recipe["output"])
    assert f"{shift}: has changed" in said
    assert main(["eval", recipe["output"], "--plugin", str(shift)]) == 0
    registry.cache_clear()
    shift.unlink()
    said = said_by(capsys, "eval", recipe["output"])
    assert f"{shift}: no such file" in said
    assert "--plugin" in said


def test_a_run_that_goes_on_brings_its_plugin_back(
    recipe: dict[str, Any], shift: Path, tmp_path: Path
) -> None:
    (tmp_path / "shift.yaml").write_text(
        yaml.safe_dump({**recipe, "method": "shift", "method_args": {}})
    )
    assert (
        main(["train", str(tmp_path / "shift.yaml"), "--resume", "training.steps=8"])
        == 0
    )
    result = json.loads((Path(recipe["output"]) / "result.json").read_text())
    assert result["steps"] == 8


def test_home_is_one_folder_for_all_files_of_a_run(
    recipe: dict[str, Any],
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    single_files: None,
) -> None:
    home = tmp_path / "home"
    shutil.copytree(encoder, home / "model")
    jsonl(home / "rows.jsonl", opinions(60))
    (home / "shift.py").write_text(PLUGIN)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    asked = {**recipe, "model": "~/model", "data": "~/rows.jsonl", "output": "~/run"}
    (home / "recipe.yaml").write_text(yaml.safe_dump(asked))
    assert main(["train", "~/recipe.yaml", "--plugin=~/shift.py"]) == 0
    assert main(["train", "~/recipe.yaml", "--resume", "training.steps=8"]) == 0
    assert (
        main(["predict", "~/run", "--data=~/rows.jsonl", "--out", "~/answers.jsonl"])
        == 0
    )
    assert main(["merge", "~/run", "~/merged"]) == 0
    assert evaluate("~/run")["accuracy"] >= 0
    left = {path.name for path in home.iterdir()}
    assert left >= {"run", "answers.jsonl", "merged"}
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("{file}", "is a file; name a folder"),
        ("{file}/run", "is a file; name another folder"),
        ("/dev/null/run", "/dev/null is a file"),
        ("/proc/nowhere/run", "/proc/nowhere"),
        ("{tmp}/" + "x" * 300, "File name too long"),
        ("~nobody-of-that-name/run", "no home folder of ~nobody-of-that-name"),
        ("a\0b", "a path has no NUL character"),
    ],
)
def test_an_output_where_none_can_be(
    recipe: dict[str, Any], tmp_path: Path, output: str, words: str
) -> None:
    output = output.format(file=recipe["data"], tmp=tmp_path)
    assert words in refusal({**recipe, "output": output})
    assert os.listdir(tmp_path) == ["opinions.jsonl"]


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["torch.save", "pathlib.Path.write_text"])
def test_a_full_disk(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        said = refusal(changed(recipe, checkpoint_every=2))
    assert recipe["output"] in said
    assert "No space left on device" in said
    assert train(recipe, quiet=True, overwrite=True, final_eval=False).steps == 6


def test_answers_that_a_disk_does_not_take(
    recipe: dict[str, Any], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", file]) == 0
    asked = ("predict", recipe["output"], "--data", recipe["data"], "--out")
    assert said_by(capsys, *asked, "/dev/full").endswith(
        "/dev/full: No space left on device."
    )
    assert "is a file" in said_by(capsys, *asked, f"{file}/answers.jsonl")


def test_a_merge_that_does_not_end_leaves_nothing(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe, quiet=True, final_eval=False)
    run = load_run(recipe["output"])
    monkeypatch.setattr(type(run.tokenizer), "save_pretrained", full)
    with pytest.raises(PetuneError, match="merged: No space left on device"):
        run.merge(tmp_path / "merged")
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]
