import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from samples import jsonl, opinions
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import petune
from petune import PetuneError, UnmergeableError, UnsupportedError
from petune.core.frozen.weights import is_quantized
from petune.training import evaluate, export_run, load_run, merge_run, predict, train


def test_a_run_scores_what_training_reported(recipe: dict[str, Any]) -> None:
    result = train(recipe, quiet=True)
    again = evaluate(recipe["output"])
    assert again["score"] == pytest.approx(result.score)
    assert {key: again[key] for key in result.metrics} == pytest.approx(result.metrics)


def test_a_run_answers_in_order_and_keeps_the_other_columns(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    train(recipe, quiet=True)
    rows = [
        {key: row[key] for key in ("id", "sentence")} for row in opinions(20, seed=5)
    ]  # no label is needed
    answers = predict(recipe["output"], jsonl(tmp_path / "new.jsonl", rows))
    assert [{key: row[key] for key in ("id", "sentence")} for row in answers] == rows
    assert {row["prediction"] for row in answers} <= {"neg", "pos"}
    assert predict(recipe["output"], rows) == answers
    scored = evaluate(
        recipe["output"], jsonl(tmp_path / "scored.jsonl", opinions(20, seed=5))
    )
    hits = [
        row["prediction"] == truth["gold"]
        for row, truth in zip(answers, opinions(20, seed=5), strict=True)
    ]
    assert scored["accuracy"] == pytest.approx(sum(hits) / 20)


def test_a_run_can_be_used_from_anywhere(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = train({**recipe, "data": "opinions.jsonl", "output": "run"}, quiet=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate(tmp_path / "run")["score"] == pytest.approx(result.score)


@pytest.mark.parametrize("kind", ["recipe", "generation"])
def test_a_merged_run_needs_no_petune(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    recipe = request.getfixturevalue(kind)
    train(recipe, quiet=True)
    run = load_run(recipe["output"])
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad():
        expected = run.model(**batch).logits
    out = tmp_path / "merged"
    merge_run(recipe["output"], out)
    auto = (
        AutoModelForSequenceClassification if kind == "recipe" else AutoModelForCausalLM
    )
    plain, info = auto.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(plain).__module__.startswith("transformers.")
    with torch.no_grad():
        torch.testing.assert_close(
            plain(**batch).logits, expected, atol=1e-5, rtol=1e-4
        )
    assert (
        AutoTokenizer.from_pretrained(out)("good")["input_ids"]
        == run.tokenizer("good")["input_ids"]
    )
    if kind == "recipe":
        assert plain.config.id2label == {0: "neg", 1: "pos"}


def test_what_can_not_be_merged_is_refused_and_leaves_nothing(
    generation: dict[str, Any], tmp_path: Path
) -> None:
    train(
        {**generation, "method": "prefix-tuning", "method_args": {"length": 2}},
        quiet=True,
    )
    with pytest.raises(UnmergeableError, match="prefix-tuning"):
        merge_run(generation["output"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_exported_run_serves_in_peft(
    generation: dict[str, Any], tmp_path: Path
) -> None:
    train(generation, quiet=True)
    run = load_run(generation["output"])
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    base = AutoModelForCausalLM.from_pretrained(generation["model"])
    export_run(generation["output"], tmp_path / "out", "serving")
    served = PeftModel.from_pretrained(base, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(
            served(**batch).logits, run.model(**batch).logits, atol=1e-5, rtol=1e-4
        )


def test_a_head_is_nothing_that_engines_serve(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    train(recipe, quiet=True)
    with pytest.raises(UnsupportedError, match="head that was trained along"):
        export_run(recipe["output"], tmp_path / "out", "serving")
    assert not (tmp_path / "out").exists()


def test_a_quantized_run_merges_into_its_precision(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    train({**recipe, "precision": "nf4"}, quiet=True)
    out = tmp_path / "merged"
    merged = merge_run(recipe["output"], out, quantized=True)
    assert 0 < max(merged.errors.values()) < 0.2
    model = petune.from_pretrained(out)
    assert sum(map(is_quantized, model.modules())) == len(merged.errors)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7, 8]])).logits).all()


def test_a_merge_that_can_not_be_written_is_refused(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    train(recipe, quiet=True)
    with pytest.raises(PetuneError, match=r"is not quantized \(precision: fp32\)"):
        merge_run(recipe["output"], tmp_path / "merged", quantized=True)
    run = load_run(recipe["output"])
    run.model.bert.embeddings.more = torch.nn.Linear(2, 2)
    with pytest.raises(
        PetuneError,
        match=r"a saved bert has no place for bert\.embeddings\.more\.weight",
    ):
        run.merge(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_folder_in_the_way_of_a_merge(recipe: dict[str, Any]) -> None:
    train(recipe, quiet=True)
    with pytest.raises(PetuneError, match="exists already"):
        merge_run(recipe["output"], recipe["output"])


def test_no_run(tmp_path: Path, recipe: dict[str, Any]) -> None:
    with pytest.raises(PetuneError, match="no run; `petune train`"):
        load_run(tmp_path / "nowhere")
    run = Path(recipe["output"])
    train(recipe, quiet=True)
    (run / "adapter" / "adapter.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(PetuneError, match=r"adapter\.safetensors"):
        load_run(run)
    (run / "task.json").write_text("{")
    with pytest.raises(PetuneError, match=r"task\.json: not JSON"):
        load_run(run)


def test_a_run_is_told_from_its_files_alone(recipe: dict[str, Any]) -> None:
    train({**recipe, "method": "bitfit", "method_args": {}}, quiet=True)
    run = load_run(recipe["output"])
    assert run.tuning.method == "bitfit"
    assert run.recipe.training.seed == 0
    assert (
        json.loads((run.path / "result.json").read_text())["metric"] == run.task.metric
    )
