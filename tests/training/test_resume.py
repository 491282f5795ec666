"""A run that was stopped goes on as if it had not been."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import changed, rows, same_weights, weights

from petune import PetuneError
from petune.training import evaluate, train
from petune.training.recorder import Recorder
from petune.training.signals import Interrupted


class Crash(Exception):
    pass


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Training dies at the end of the step given."""
    whole = Recorder.on_step_end

    def at(step: int | None) -> None:
        def dying(
            self: Recorder, args: Any, state: Any, control: Any, **more: Any
        ) -> None:
            whole(self, args, state, control, **more)
            if state.global_step == step:
                raise Crash

        monkeypatch.setattr(Recorder, "on_step_end", dying)

    return at


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(
    recipe: dict[str, Any], tmp_path: Path, crash_at: Any, accumulation: int
) -> None:
    recipe = changed(recipe, steps=40, checkpoint_every=7, schedule="cosine", warmup=0.1,
                     gradient_accumulation=accumulation)  # fmt: skip
    recipe["method_args"] = {
        "rank": 4,
        "dropout": 0.2,
    }  # draws random numbers at every step
    whole, broken = (
        {**recipe, "output": str(tmp_path / name)} for name in ("whole", "broken")
    )
    expected = train(whole, quiet=True)
    for step in (
        6,
        9,
        26,
    ):  # before the first checkpoint, in the first epoch, in a later one
        crash_at(step)
        with pytest.raises(Crash):
            train(broken, quiet=True, resume=True)
    crash_at(None)
    got = train(broken, quiet=True, resume=True)
    assert same_weights(weights(whole["output"]), weights(broken["output"]))
    assert (got.score, got.tokens, got.train_loss) == (
        expected.score,
        expected.tokens,
        expected.train_loss,
    )
    keys = ("step", "loss", "learning_rate", "tokens")
    logs = [
        [[row[key] for key in keys] for row in rows(run["output"])]
        for run in (whole, broken)
    ]
    assert logs[0] == logs[1]
    assert train(broken, quiet=True, resume=True) == got  # nothing is left to do


def test_checkpoints_hold_the_adapter_and_nothing_to_unpickle(
    recipe: dict[str, Any],
) -> None:
    train(changed(recipe, checkpoint_every=2, optimizer="adamw_torch"), quiet=True)
    folders = sorted((Path(recipe["output"]) / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == [
        "checkpoint-4",
        "checkpoint-6",
    ]  # the last two are kept
    files = {
        str(path.relative_to(folders[0]))
        for path in folders[0].rglob("*")
        if path.is_file()
    }
    assert files == {
        "adapter/adapter.json", "adapter/adapter.safetensors", "clock.json", "optimizer.pt", "scheduler.pt",
        "rng_state.pth", "trainer_state.json",
    }  # fmt: skip
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(folders[0] / name, weights_only=True)


def test_resuming_unpickles_nothing(
    recipe: dict[str, Any], crash_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(recipe, checkpoint_every=2)
    crash_at(4)
    with pytest.raises(Crash):
        train(recipe, quiet=True)
    crash_at(None)
    load, asked = torch.load, []

    def watched(*args: Any, **more: Any) -> Any:
        asked.append(more.get("weights_only"))
        return load(*args, **more)

    monkeypatch.setattr(torch, "load", watched)
    train(recipe, quiet=True, resume=True)
    assert asked
    assert all(asked)


def test_a_checkpoint_cut_short_is_passed_over(
    recipe: dict[str, Any], crash_at: Any
) -> None:
    recipe = changed(recipe, checkpoint_every=2)
    crash_at(5)
    with pytest.raises(Crash):
        train(recipe, quiet=True)
    crash_at(None)
    (
        Path(recipe["output"]) / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    ).unlink()
    assert train(recipe, quiet=True, resume=True).steps == 6


def test_a_run_in_the_way(recipe: dict[str, Any], crash_at: Any) -> None:
    recipe = changed(recipe, checkpoint_every=2)
    crash_at(3)
    with pytest.raises(Crash):
        train(recipe, quiet=True)
    crash_at(None)
    with pytest.raises(PetuneError, match="unfinished run; --resume goes on"):
        train(recipe, quiet=True)
    with pytest.raises(PetuneError, match=r"another method_args, training\.seed"):
        train(
            {**changed(recipe, seed=1), "method_args": {"rank": 2}},
            quiet=True,
            resume=True,
        )
    first = train(recipe, quiet=True, resume=True)
    with pytest.raises(PetuneError, match="finished run; --overwrite"):
        train(recipe, quiet=True)
    mine = Path(recipe["output"]) / "notes.txt"
    mine.write_text("keep me")
    again = train(recipe, quiet=True, overwrite=True)
    assert again.score == first.score
    assert mine.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_to_resume_from(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    expected = train({**recipe, "output": str(tmp_path / "whole")}, quiet=True)
    begin = Recorder.on_step_begin

    def interrupted(
        self: Recorder, args: Any, state: Any, control: Any, **more: Any
    ) -> None:
        begin(self, args, state, control, **more)
        if state.global_step == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_begin", interrupted)
        with pytest.raises(Interrupted, match="stopped at step 4 of 6; --resume"):
            train(recipe, quiet=True)
    assert signal.getsignal(number) is before
    assert not (Path(recipe["output"]) / "result.json").exists()
    assert train(recipe, quiet=True, resume=True).score == expected.score
    assert same_weights(weights(recipe["output"]), weights(str(tmp_path / "whole")))


def test_an_adapter_whose_scoring_was_stopped_is_kept(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("petune_plugins.tasks.classification.Classification.score", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, quiet=True)
    with pytest.raises(PetuneError, match="`petune eval` scores it"):
        train(recipe, quiet=True)
    assert evaluate(recipe["output"])["metric"] == "accuracy"
