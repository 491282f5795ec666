import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from samples import changed, jsonl, opinions, rows, same_weights, weights

from petune import PetuneError
from petune.training import Recipe, Result, evaluate, load_recipe, packing, train
from petune.training.host_model import _takes_every


def test_a_run_and_its_folder(recipe: dict[str, Any]) -> None:
    result = train(changed(recipe, steps=60, batch_size=8, eval_every=30), quiet=True)
    run = Path(recipe["output"])
    assert result.score == result.metrics["accuracy"] > 0.6
    assert (result.metric, result.steps) == ("accuracy", 60)
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml", "task.json", "data.json", "adapter", "metrics.jsonl", "result.json", "checkpoints",
    }  # fmt: skip
    assert (
        Recipe.model_validate(
            yaml.safe_load((run / "recipe.yaml").read_text())
        ).training.steps
        == 60
    )
    assert json.loads((run / "task.json").read_text()) == {"labels": ["neg", "pos"]}
    assert Result.read(run) == result
    written = json.loads((run / "result.json").read_text())
    figures = ("train_seconds", "step_seconds", "tokens_per_second", "peak_memory_bytes", "saved_activation_bytes",
               "trainable_params", "adapter_bytes", "load_seconds", "eval_seconds")  # fmt: skip
    assert all(written[key] > 0 for key in figures)
    assert written["score"] == written["accuracy"]
    logged = [row for row in rows(recipe["output"]) if "loss" in row]
    assert [row["step"] for row in logged] == list(range(2, 61, 2))
    assert all(
        {"step", "loss", "learning_rate", "tokens", "seconds"} <= row.keys()
        for row in logged
    )
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert logged[-1]["tokens"] == result.tokens
    assert [
        row["step"] for row in rows(recipe["output"]) if "eval_accuracy" in row
    ] == [30, 60]


def test_tokens_are_counted_without_padding(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    data = jsonl(
        tmp_path / "uneven.jsonl",
        [{"t": "good " * (i % 7 + 1), "l": i % 2} for i in range(20)],
    )
    files = {"train": str(data), "validation": str(data), "test": str(data)}
    result = train(
        {
            **changed(recipe, steps=5),
            "data": files,
            "columns": {"text": "t", "label": "l"},
        },
        quiet=True,
    )
    assert result.tokens == sum(
        i % 7 + 1 for i in range(20)
    )  # five batches of four: one epoch


def test_the_same_seed_gives_the_same_run_and_another_another(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    outs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        outs.append(str(tmp_path / name))
        train({**changed(recipe, seed=seed), "output": outs[-1]}, quiet=True)
    assert same_weights(weights(outs[0]), weights(outs[1]))
    assert not same_weights(weights(outs[0]), weights(outs[2]))


def test_a_folder_of_other_files_is_left_alone(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(PetuneError, match="holds other files than a run"):
            train(
                {**recipe, "output": str(tmp_path / "mine")},
                quiet=True,
                overwrite=overwrite,
            )
    with pytest.raises(PetuneError, match="is a file"):
        train({**recipe, "output": str(tmp_path / "mine" / "thesis.tex")}, quiet=True)


def test_a_peer_in_the_same_loop(generation: dict[str, Any]) -> None:
    import peft

    class Peer:
        def __init__(self, model: Any) -> None:
            config = peft.LoraConfig(
                r=4,
                lora_alpha=16,
                target_modules=["q_proj", "v_proj"],
                task_type="CAUSAL_LM",
            )
            self.model = peft.get_peft_model(model, config)

        def parameters(self) -> list[torch.nn.Parameter]:
            return [p for p in self.model.parameters() if p.requires_grad]

        def save(self, folder: str | Path) -> None:
            self.model.save_pretrained(folder)

    asked: list[Recipe] = []

    def adapt(model: Any, recipe: Recipe) -> Peer:
        asked.append(recipe)
        return Peer(model)

    result = train({**generation, "method": "peft's"}, adapt=adapt, quiet=True)
    assert asked[0].method == "peft's"
    assert result.trainable_params == sum(
        p.numel() for p in weights_of_peft(generation["output"]).values()
    )
    assert result.adapter_bytes > 0
    assert result.score is not None


def weights_of_peft(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


def test_without_a_final_evaluation(recipe: dict[str, Any]) -> None:
    result = train(recipe, quiet=True, final_eval=False)
    assert (result.score, result.metrics) == (None, {})
    assert Result.read(recipe["output"]) == result


def test_epochs_accumulation_and_optimizers(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    training = {"epochs": 2, "batch_size": 5, "gradient_accumulation": 2, "optimizer": "adafactor",
                "gradient_checkpointing": True, "group_by_length": False, "learning_rate": 1e-3}  # fmt: skip
    result = train({**recipe, "training": training}, quiet=True)
    assert result.steps == 2 * 5  # 48 rows: 10 batches, 5 updates an epoch


def test_accumulation_is_one_large_batch(
    generation: dict[str, Any], tmp_path: Path
) -> None:
    small, large = str(tmp_path / "small"), str(tmp_path / "large")
    train(
        {
            **changed(
                generation, batch_size=4, gradient_accumulation=2, group_by_length=False
            ),
            "output": small,
        },
        quiet=True,
    )
    train(
        {**changed(generation, batch_size=8, group_by_length=False), "output": large},
        quiet=True,
    )
    a, b = weights(small), weights(large)
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)


def test_logits_only_where_there_is_a_label_change_nothing_but_memory(
    generation: dict[str, Any], tmp_path: Path
) -> None:
    some, every = str(tmp_path / "some"), str(tmp_path / "every")
    less = train({**generation, "output": some}, quiet=True)
    more = train(
        {**changed(generation, labelled_logits=False), "output": every}, quiet=True
    )
    a, b = weights(some), weights(every)
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)
    assert less.metrics == pytest.approx(more.metrics, abs=1e-5)
    assert less.saved_activation_bytes < more.saved_activation_bytes


SLOW = pytest.mark.slow
SETTINGS = [
    {"recompute": False},
    {"gradient_checkpointing": True},
    pytest.param(
        {"gradient_checkpointing": 2},
        marks=pytest.mark.skipif(
            not _takes_every(), reason="transformers 5.16 can leave blocks out"
        ),
    ),
    {"packing": False},
    {"packing": False, "gradient_checkpointing": True},
    {"optimizer": "adamw_8bit"},
    {"labelled_logits": False},
    pytest.param({"compile": "regions", "memory_budget": 0.3}, marks=SLOW),
    pytest.param({"compile": "regions", "packing": False}, marks=SLOW),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_change_nothing_but_the_cost(
    generation: dict[str, Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    plain = train({**generation, "output": str(tmp_path / "plain")}, quiet=True)
    other = train(
        {**changed(generation, **settings), "output": str(tmp_path / "other")},
        quiet=True,
    )
    a, b = weights(str(tmp_path / "plain")), weights(str(tmp_path / "other"))
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)
    assert other.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=1e-4)
    assert other.tokens == plain.tokens
    if "gradient_checkpointing" in settings or "compile" in settings:
        assert other.saved_activation_bytes < plain.saved_activation_bytes
    elif "recompute" in settings:
        assert other.saved_activation_bytes > plain.saved_activation_bytes


def test_padded_batches_stand_end_to_end_unless_told_otherwise(
    generation: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def flatten(batch: Any) -> Any:
        flat, rows = packing.flatten(batch)
        shapes.append(tuple(flat["input_ids"].shape))
        return flat, rows

    monkeypatch.setattr("petune.training.lean.flatten", flatten)
    train(generation, quiet=True)
    assert shapes
    assert all(rows == 1 for rows, _ in shapes)
    shapes.clear()
    train(
        {
            **changed(generation, packing=False),
            "output": generation["output"] + "-padded",
        },
        quiet=True,
    )
    assert not shapes


@pytest.mark.parametrize("setting", ["mixed_precision", "offload", "liger"])
def test_what_needs_cuda(recipe: dict[str, Any], setting: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(PetuneError, match=rf"training\.{setting}: needs a CUDA device"):
        train(changed(recipe, **{setting: True}), quiet=True)


def test_what_the_settings_exclude(recipe: dict[str, Any]) -> None:
    with pytest.raises(PetuneError, match=r"add training\.compile"):
        load_recipe(changed(recipe, memory_budget=0.5))
    with pytest.raises(PetuneError, match="excludes gradient_checkpointing"):
        load_recipe(changed(recipe, compile="regions", gradient_checkpointing=True))
    with pytest.raises(PetuneError, match=r"training\.packing"):
        train(changed(recipe, packing=True), quiet=True)
    assert not Path(recipe["output"]).exists(), (
        "nothing is left of what could not begin"
    )


@pytest.mark.parametrize(
    "method",
    ["prompt-tuning", "prefix-tuning", "houlsby", "bitfit", "full", "last-layers"],
)
def test_methods_of_every_kind(generation: dict[str, Any], method: str) -> None:
    args = {"length": 3} if "tuning" in method else {}
    result = train({**generation, "method": method, "method_args": args}, quiet=True)
    assert result.trainable_params > 0


@pytest.mark.parametrize("precision", ["bf16", "nf4", "int8"])
@pytest.mark.parametrize("kind", ["recipe", "generation"])
def test_at_every_precision(
    request: pytest.FixtureRequest, kind: str, precision: str
) -> None:
    recipe = request.getfixturevalue(kind)
    whole = train({**recipe, "output": recipe["output"] + "-whole"}, quiet=True)
    result = train({**recipe, "precision": precision}, quiet=True)
    assert result.trainable_params == whole.trainable_params
    assert result.peak_memory_bytes < whole.peak_memory_bytes
    assert evaluate(recipe["output"])["loss"] == pytest.approx(
        result.metrics["loss"], rel=1e-3
    )


def test_one_label_only_is_no_classification(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    data = jsonl(
        tmp_path / "dull.jsonl", [{**row, "gold": "pos"} for row in opinions(20)]
    )
    with pytest.raises(PetuneError, match="1 different labels"):
        train({**recipe, "data": str(data)}, quiet=True)
