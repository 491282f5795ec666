"""What a recipe accepts trains to the end; what can't is refused before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import SIZES, changed, jsonl, opinions, rows, save_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaModel,
    SchedulerType,
    T5Config,
    T5ForConditionalGeneration,
    get_scheduler,
)
from transformers.training_args import OptimizerNames

from petune import PetuneError
from petune.training import load_recipe, train
from petune.training.fit import fitted
from petune.training.optimizers import UNFIT
from petune.training.places import places

NEEDED: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"schedule_args": {"min_lr": 1e-4}},
    "cosine_warmup_with_min_lr": {"schedule_args": {"min_lr_rate": 0.1}, "warmup": 2},
    "warmup_stable_decay": {"schedule_args": {"num_decay_steps": 2}, "warmup": 1},
    "reduce_lr_on_plateau": {"eval_every": 2, "schedule_args": {"factor": 0.5}},
    "greedy": {"eval_every": 2, "schedule_args": {"patience": 1}},
}
"""What a schedule can't do without, or takes."""
PLATEAU = {"schedule": "reduce_lr_on_plateau", "eval_every": 2}
BY_SCORE = ("reduce_lr_on_plateau", "greedy")


def refusal(recipe: dict[str, Any]) -> str:
    """What a training says that is refused; nothing is left of it."""
    with pytest.raises(PetuneError) as error:
        train(recipe, quiet=True)
    said = str(error.value)
    assert "\n" not in said
    assert not Path(recipe["output"]).exists()
    return said


@pytest.mark.parametrize("schedule", [schedule.value for schedule in SchedulerType])
def test_every_schedule_trains_by_the_rates_of_transformers(
    recipe: dict[str, Any], schedule: str
) -> None:
    more = NEEDED.get(schedule, {})
    asked = changed(recipe, steps=5, log_every=1, schedule=schedule, **more)
    train(asked, quiet=True, final_eval=False)
    logged = [row["learning_rate"] for row in rows(recipe["output"]) if "loss" in row]
    if schedule in BY_SCORE:
        assert logged[:2] == [1e-2, 1e-2]
        return
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    reference = get_scheduler(
        schedule,
        optimizer,
        num_warmup_steps=more.get("warmup", 0),
        num_training_steps=5,
        scheduler_specific_kwargs=more.get("schedule_args"),
    )
    expected = []
    for _ in range(5):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert logged == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"schedule": "warmup_stable_decay"}, "needs training.schedule_args.num_decay_steps"),
        ({"schedule": "cosine_with_min_lr"}, "min_lr or min_lr_rate should be set through training.schedule_args"),
        ({"schedule": "reduce_lr_on_plateau"}, "add training.eval_every"),
        ({"schedule": "greedy"}, "add training.eval_every"),
        ({"schedule": "linear", "schedule_args": {"min_lr": 1}}, "'linear' takes none"),
        ({"schedule": "polynomial", "schedule_args": {"powr": 2}}, "Did you mean 'power'"),
        ({"schedule": "polynomial", "schedule_args": {"power": -1}}, "0.0 cannot be raised"),
        ({"schedule": "polynomial", "schedule_args": {"lr_end": 1}}, "lr_end"),
        ({"schedule": "warmup_stable_decay", "schedule_args": {"num_decay_steps": "2"}}, "unsupported operand"),
        ({"schedule": "warmup_stable_decay", "schedule_args": {"num_decay_steps": 900}}, "stays below 0.001"),
        ({"schedule": "cosine", "schedule_args": {"num_cycles": float("nan")}}, "nan should be a finite number"),
        ({"schedule": "inverse_sqrt", "schedule_args": {"timescale": 0}}, "division by zero"),
        ({**PLATEAU, "schedule_args": {"factor": 2}}, "Factor should be < 1.0"),
        ({**PLATEAU, "schedule_args": {"threshold": "a"}}, "unsupported operand"),
        ({"schedule": "greedy", "eval_every": 2, "warmup": 3}, "training.warmup: 'greedy' has none"),
        ({"warmup": 1.5}, "1.5 is no whole number of steps"),
        ({"warmup": 1000}, "stays below"),
        ({"learning_rate": float("inf")}, "training.learning_rate"),
        ({"seed": 2**32}, "training.seed"),
    ],
)  # fmt: skip
def test_a_schedule_that_can_not_work_is_refused(
    recipe: dict[str, Any], training: dict[str, Any], words: str
) -> None:
    assert words in refusal(changed(recipe, **training))


def test_arguments_that_are_no_numbers(recipe: dict[str, Any]) -> None:
    said = refusal({**recipe, "method_args": {"alpha": float("nan")}})
    assert "method_args.alpha: nan should be a finite number" in said


def test_a_schedule_is_looked_at_for_the_steps_that_the_rows_come_to(
    recipe: dict[str, Any],
) -> None:
    asked = changed(recipe, steps=None, epochs=1, schedule="warmup_stable_decay",
                    schedule_args={"num_decay_steps": 400})  # fmt: skip
    assert "for all 12 steps" in refusal(asked)


QUICK = (
    "adafactor",
    "adamw_torch",
    "adamw_bnb_8bit",
    "lion_32bit",
    "sgd",
)
REFUSED = (
    "galore_adamw",
    "apollo_adamw",
    "lomo",
    "adalomo",
    "schedule_free_sgd",
    "adamw_torch_xla",
)
"""One of each kind; the others take half a minute together."""


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(
            name.value,
            marks=[] if name.value in (*QUICK, *REFUSED) else pytest.mark.slow,
        )
        for name in OptimizerNames
    ],
)
def test_every_optimizer_trains_or_is_refused_by_name(
    recipe: dict[str, Any], optimizer: str
) -> None:
    asked = changed(recipe, steps=2, optimizer=optimizer)
    try:
        load_recipe(asked).check()
    except PetuneError:
        assert optimizer not in QUICK
        assert f"training.optimizer: '{optimizer}'" in refusal(asked)
        return
    assert not optimizer.startswith(tuple(UNFIT))
    assert train(asked, quiet=True, final_eval=False).steps == 2


@pytest.mark.parametrize(
    ("key", "value"), [("model", ""), ("data", ""), ("data", {}), ("output", "")]
)
def test_an_empty_name_is_refused_by_its_key(
    recipe: dict[str, Any], key: str, value: Any
) -> None:
    with pytest.raises(PetuneError, match=f"^recipe: {key}: is empty"):
        train({**recipe, key: value}, quiet=True)


def test_a_head_that_is_not_the_tasks(recipe: dict[str, Any]) -> None:
    said = refusal({**recipe, "head": "token-classification"})
    assert "'classification' trains a 'sequence-classification'" in said
    assert "leave `head` out" in said


@pytest.fixture
def seq2seq(tmp_path: Path) -> dict[str, Path]:
    """A T5 and a BART whose tokenizer adds no end token."""
    found = {}
    plain = {"eos_token_id": 4, "pad_token_id": 0, "decoder_start_token_id": 0}
    for name in ("t5", "bart"):
        folder = found[name] = tmp_path / name
        size = save_tokenizer(folder)
        torch.manual_seed(0)
        if name == "t5":
            sizes = {
                "d_model": 32,
                "d_kv": 8,
                "d_ff": 64,
                "num_layers": 1,
                "num_heads": 4,
            }
            T5ForConditionalGeneration(
                T5Config(vocab_size=size, **sizes, **plain)
            ).save_pretrained(folder)
        else:
            stack = {f"{s}_{k}": v for s in ("encoder", "decoder")
                     for k, v in {"layers": 1, "ffn_dim": 64, "attention_heads": 4}.items()}  # fmt: skip
            BartForConditionalGeneration(
                BartConfig(vocab_size=size, d_model=32, max_position_embeddings=64, **stack, **plain)
            ).save_pretrained(folder)  # fmt: skip
    return found


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_is_suggested_for_an_encoder_decoder_works(
    recipe: dict[str, Any],
    generation: dict[str, Any],
    seq2seq: dict[str, Path],
    name: str,
) -> None:
    model = str(seq2seq[name])
    if name == "t5":
        said = refusal({**generation, "model": model})
        assert "a t5 has no 'causal-lm' head" in said
        assert "its tasks: classification" in said
        said = refusal({**generation, "model": model, "head": "seq2seq-lm"})
        assert "'generation' trains a 'causal-lm'" in said
    result = train({**recipe, "model": model}, quiet=True)
    assert 0 <= (result.score or 0) <= 1


def save_gpt2(folder: Path) -> Path:
    """A GPT-2 of 64 positions."""
    size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=64, pad_token_id=0,
                        eos_token_id=4, bos_token_id=4)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def long_rows(folder: Path) -> str:
    told = [{"text": "good " * 300, "label": i % 2, "prompt": "bad " * 300, "completion": "good " * 300}
            for i in range(12)]  # fmt: skip
    return str(jsonl(folder / "long.jsonl", told))


@pytest.mark.parametrize(
    ("task", "method", "length", "room"),
    [
        ("classification", "lora", None, 64),
        ("classification", "prompt-tuning", None, 44),
        ("classification", ["lora", "p-tuning"], None, 44),
        ("classification", "prefix-tuning", None, 64),  # a prefix has no positions
        ("generation", "lora", None, 59),
        ("generation", "prompt-tuning", 7, 52),
    ],
)
def test_texts_are_as_long_as_the_model_has_positions_for(
    tmp_path: Path, task: str, method: Any, length: int | None, room: int
) -> None:
    asked = {
        "model": str(save_gpt2(tmp_path / "model")),
        "task": task,
        "method": method,
        "method_args": {} if length is None else {"length": length},
        "data": long_rows(tmp_path),
        "training": {"steps": 1, "batch_size": 2, "max_new_tokens": 5},
        "output": str(tmp_path / "run"),
    }
    assert fitted(load_recipe(asked)).training.max_length == room
    said = refusal(changed(asked, max_length=room + 1))
    assert f"training.max_length={room + 1}" in said
    assert "has positions for 64 tokens" in said
    assert f"at most {room} for a row" in said
    assert train(changed(asked, max_length=room), quiet=True).steps == 1


def test_answers_that_were_not_asked_for_leave_half_of_the_positions(
    tmp_path: Path,
) -> None:
    asked = {
        "model": str(save_gpt2(tmp_path / "model")),
        "task": "generation",
        "data": long_rows(tmp_path),
        "training": {"steps": 1, "batch_size": 2},
        "output": str(tmp_path / "run"),
    }
    training = fitted(load_recipe(asked)).training
    assert (training.max_length, training.max_new_tokens) == (32, 32)
    assert "leaves none" in refusal(changed(asked, max_new_tokens=64))


def test_positions_are_counted_from_behind_the_padding() -> None:
    plain = {**SIZES, "vocab_size": 32, "pad_token_id": 1}
    roberta = RobertaModel(RobertaConfig(max_position_embeddings=20, **plain)).eval()
    assert places(roberta) == 18
    ids = torch.full((1, 18), 7)
    with torch.no_grad():
        roberta(ids)
        with pytest.raises((IndexError, RuntimeError)):
            roberta(torch.full((1, 19), 7))


def test_a_model_that_computes_its_positions_takes_any_length(decoder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(decoder)
    assert places(model) is None


@pytest.mark.parametrize("split", ["test", "validation"])
def test_labels_that_training_does_not_have(
    recipe: dict[str, Any], tmp_path: Path, split: str
) -> None:
    folder = tmp_path / "splits"
    folder.mkdir()
    jsonl(folder / "train.jsonl", opinions(20))
    unknown = [{**row, "gold": "-1"} for row in opinions(3)]
    jsonl(folder / f"{split}.jsonl", [*opinions(4), *unknown])
    said = refusal({**recipe, "data": str(folder)})
    assert f"'-1' is in 3 of the 7 rows of the split '{split}'" in said


def test_a_note_of_what_was_read_stays_with_the_run(recipe: dict[str, Any]) -> None:
    train(recipe, quiet=True, final_eval=False)
    noted = json.loads((Path(recipe["output"]) / "data.json").read_text())
    assert {split: about["rows"] for split, about in noted.items()} == {
        "train": 48,
        "validation": 6,
        "test": 6,
    }
