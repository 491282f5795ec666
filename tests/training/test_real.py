"""The real path: models and data from the package index, a few steps each."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from petune.training import evaluate, load_run, merge_run, predict, train

pytestmark = pytest.mark.slow


def test_an_encoder_learns_to_tell_opinions(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "model": "minilm",
        "method": "lora",
        "task": "classification",
        "data": "vader-movies",
        "training": {
            "steps": 40,
            "batch_size": 16,
            "learning_rate": 2e-3,
            "eval_rows": 300,
            "warmup": 0.1,
        },
        "output": str(tmp_path / "run"),
    }
    result = train(recipe, quiet=True)
    assert result.score is not None
    assert result.score > 0.6
    assert evaluate(tmp_path / "run")["score"] == pytest.approx(result.score)


def test_a_4_bit_decoder_learns_answers_and_is_merged(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "model": "smollm2-135m",
        "precision": "nf4",
        "method": "lora",
        "task": "generation",
        "data": "nq-sample",
        "training": {
            "steps": 6,
            "batch_size": 4,
            "log_every": 1,
            "eval_rows": 4,
            "max_new_tokens": 8,
        },
        "output": str(tmp_path / "run"),
    }
    result = train(recipe, quiet=True)
    assert result.metrics["perplexity"] < 500
    question = [{"prompt": "who wrote the origin of species"}]
    assert isinstance(predict(tmp_path / "run", question)[0]["prediction"], str)
    run = load_run(tmp_path / "run")
    ids = run.tokenizer("The origin of species", return_tensors="pt")
    with torch.no_grad():
        expected = run.model(**ids).logits
    out = tmp_path / "merged"
    merge_run(tmp_path / "run", out)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).chat_template
    with torch.no_grad():
        torch.testing.assert_close(plain(**ids).logits, expected, atol=2e-2, rtol=1e-2)
