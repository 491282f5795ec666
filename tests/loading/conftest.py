"""What the tests of loading share: checkpoints of a few thousand parameters, and a quantizer that only listens."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import SMALL
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from petune.core.registry.plugins import registry


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders of tiny checkpoints."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    t5 = T5Config(
        vocab_size=96, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2
    )
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**SMALL)),
        "bert": BertModel(BertConfig(**SMALL)),
        "mlm": BertForMaskedLM(BertConfig(**SMALL)),
        "classifier": BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)),
        "t5": T5ForConditionalGeneration(t5),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    return SimpleNamespace(**{name: root / name for name in models})


@dataclass
class Recorder:
    """A quantizer that quantizes nothing and remembers what it was asked."""

    bits: float = 16.0
    asked: list[Any] = field(default_factory=list)

    def arguments(self, skip, dtype):
        self.asked.append((skip, dtype))
        return {"attn_implementation": "eager"}

    def prepare(self, model):
        self.asked.append(type(model).__name__)


@pytest.fixture
def quantizer(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    table = {"pretend": (recorder, "test")}
    monkeypatch.setitem(registry()._found, "petune_quantizers", table)
    return recorder
