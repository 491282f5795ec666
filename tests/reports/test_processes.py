"""More than one process: a run that several share is the run of one, and what FSDP2 has spread is saved and loaded."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import METHODS
from samples import jsonl, opinions, questions
from torch import nn

import petune
from petune.cli.app import main
from petune.testing import tiny_model
from petune.training.loop import train
from petune.training.order import EpochSampler
from petune.training.processes import Processes, Shares

STEPS = 7


def torchrun(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Two processes on the CPU."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, "--standalone", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def together(what: str, folder: Path) -> dict:
    script = Path(__file__).with_name("processes.py")
    done = torchrun(script, what, folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def rows_of(run: str) -> list[dict]:
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_two_processes_train_the_run_of_one(recipe, generation, tmp_path):
    """The loss, the tokens and one adapter. An epoch is of 11 rows: its last batch has a row for one process alone."""
    several = tmp_path / "several"
    several.mkdir()
    training = {"steps": STEPS, "batch_size": 5, "log_every": 1, "eval_every": 4}
    recipes = {
        f"causal-{method}": {**generation, "method": method, "method_args": {}}
        for method in METHODS
    }
    recipe["model"] = generation[
        "model"
    ]  # the encoder has dropout, which is each process's own
    recipes["classes"] = recipe
    recipes["accumulated"] = {**recipe, "training": {"gradient_accumulation": 2}}
    for name, values in recipes.items():
        rows = (opinions if values["task"] == "classification" else questions)(15)
        parts = {"train": rows[:11], "validation": rows[11:13], "test": rows[13:]}
        values["data"] = {
            part: str(jsonl(tmp_path / f"{name}-{part}.jsonl", some))
            for part, some in parts.items()
        }
        values["training"] = {**values["training"], **training}
        values["output"] = str(several / "runs" / name)
        (several / f"{name}.yaml").write_text(yaml.safe_dump(values))
    done = together("trained", several)
    assert done == dict.fromkeys(recipes, STEPS)
    for name, values in recipes.items():
        alone = str(tmp_path / "alone" / name)
        train({**values, "output": alone}, quiet=True)
        one, two = rows_of(alone), rows_of(values["output"])
        told = [(row["step"], row["tokens"]) for row in one]
        assert told == [(row["step"], row["tokens"]) for row in two]
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() & {"loss", "grad_norm", "eval_loss"}:
                assert a[key] == pytest.approx(b[key], abs=1e-5, rel=1e-5)
        files = Path(values["output"], "adapter").iterdir()
        assert {file.name for file in files} == {"adapter.json", "adapter.safetensors"}


def test_the_command_runs_under_torchrun_stops_together_and_goes_on(file, tmp_path):
    """A mistake is one line of the first process; a run says where it is once."""
    run = str(tmp_path / "run")
    words = ["-m", "petune.cli", "train", file, f"output={run}", "training.log_every=1"]
    done = torchrun(*words, "training.batch_size=1")
    assert done.returncode != 0
    assert "training.batch_size 1: 2 processes share a batch" in done.stderr
    assert not Path(run).exists()
    done = torchrun(*words, "training.checkpoint_every=3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The run is in") == 1
    assert [row["step"] for row in rows_of(run)] == list(range(1, 7))


@pytest.mark.parametrize(
    "variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"]
)
def test_a_launcher_that_shares_out_the_model_is_refused_by_name(
    variable, file, monkeypatch, capsys
):
    monkeypatch.setenv(variable, "true")
    assert main(["train", file]) == 2
    assert "torchrun" in capsys.readouterr().err


WHOLE = "should be a whole number"
TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
TWO |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29533"}


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without LOCAL_RANK"),
        ({**TWO, "RANK": ""}, "WORLD_SIZE=2 without RANK"),
        ({**TWO, "MASTER_ADDR": ""}, "WORLD_SIZE=2 without MASTER_ADDR"),
        ({**TWO, "MASTER_PORT": ""}, "WORLD_SIZE=2 without MASTER_PORT"),
        ({"WORLD_SIZE": "abc"}, f"WORLD_SIZE=abc: {WHOLE}"),
        ({"WORLD_SIZE": "2.0"}, f"WORLD_SIZE=2.0: {WHOLE}"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: should be at least 1"),
        ({"RANK": "x"}, f"RANK=x: {WHOLE}"),
        ({"LOCAL_RANK": "x"}, f"LOCAL_RANK=x: {WHOLE}"),
        ({"LOCAL_WORLD_SIZE": "-1"}, "LOCAL_WORLD_SIZE=-1: should be at least 1"),
        ({**TWO, "MASTER_PORT": "http"}, f"MASTER_PORT=http: {WHOLE}"),
        ({**TWO, "MASTER_PORT": "65536"}, "MASTER_PORT=65536: ports end at 65535"),
        ({**TWO, "RANK": "7"}, "RANK=7: the ranks of 2 processes are 0 to 1"),
        ({**TWO, "LOCAL_RANK": "2"}, "LOCAL_RANK=2: the ranks of 2 processes"),
        ({**TWO, "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: the ranks of 2 processes"),
        ({**TWO, "MASTER_ADDR": ".."}, "MASTER_ADDR=..: no such host"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU=maybe: should be true"),
        ({"ACCELERATE_MIXED_PRECISION": "half"}, "ACCELERATE_MIXED_PRECISION=half"),
        ({"ACCELERATE_USE_FSDP": "yes"}, "does not run under FSDP"),
    ],
)
def test_what_a_launcher_says_wrong_is_named(told, words, file, monkeypatch, capsys):
    for variable in TWO:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in told.items():
        monkeypatch.setenv(variable, value)
    assert main(["train", file]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_shares_are_the_batches():
    """Every row once, in the batch in which one process has it."""
    order = EpochSampler([1] * 11, 4, 0, grouped=False)
    shares = [list(Shares(order, 4, Processes(rank, 3))) for rank in range(3)]
    rows = list(order)
    assert len(shares[0]) == len(Shares(order, 4, Processes(0, 3))) == 3
    for number, parts in enumerate(zip(*shares, strict=True)):
        batch = rows[number * 4 : number * 4 + 4]
        assert sorted(itertools.chain.from_iterable(parts)) == sorted(batch)
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_what_fsdp2_has_spread_is_trained_saved_and_loaded(tmp_path):
    """Saving gathers, loading scatters: all as in one process."""
    found = together("sharded", tmp_path)
    assert found.keys() == set(METHODS)
    for name, told in found.items():
        exact = {key: told[key] for key in ("loss", "saved", "loaded", "trained on")}
        assert exact == pytest.approx(dict.fromkeys(exact, 0.0), abs=1e-6), name
        assert told["spread"] is True
        assert "merge it in one process" in told["merge"]
        model = tiny_model("llama")
        assert petune.load(model, tmp_path / f"{name}-again").method == name


def test_data_parallel_and_partitioned_weights_are_refused_by_name():
    model = tiny_model("llama")
    next(model.parameters()).ds_id = 0
    with pytest.raises(petune.PetuneError, match="DeepSpeed ZeRO-3"):
        petune.attach(model, "lora")
    model = tiny_model("llama")
    petune.attach(model, "lora")
    with pytest.raises(petune.PetuneError, match=r"nn\.DataParallel"):
        replicate_all(model)


def replicate_all(model: nn.Module) -> None:
    """What nn.DataParallel does with every module before each forward."""
    for module in model.modules():
        module._replicate_for_data_parallel()
