"""Models that petune did not load: what `from_pretrained` prepares, `attach` prepares too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.nn.modules as bnb
import pytest
import torch
from samples import IDS, SMALL
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

import petune
from petune.core.registry.plugins import registry
from petune.testing import tiny_model

CONFIGS: dict[str, Any] = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "nf4-single": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "int8wo": TorchAoConfig(Int8WeightOnlyConfig(version=2)),
}


@pytest.fixture(autouse=True)
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every CPU is taken for one with AVX512-BF16, on which bitsandbytes packs weights in an evaluation."""
    monkeypatch.setattr(bnb, "has_avx512bf16", lambda: True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(folder)
    return folder


def foreign(folder: Path, precision: str) -> Any:
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=CONFIGS[precision], dtype=torch.float32
    )


def losses(model: Any, evaluate: bool, method: str = "lora") -> list[float]:
    """Those of four training steps, with an evaluation after each or without."""
    torch.manual_seed(0)
    tuning = petune.attach(model, method)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=3e-2)
    found = []
    for _ in range(4):
        model.train()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(IDS)
    return found


@pytest.mark.parametrize("method", ["lora", "dora"])  # which reads the weights
@pytest.mark.parametrize("precision", CONFIGS)
def test_an_evaluation_between_two_steps_changes_nothing(llama, precision, method):
    right = losses(petune.from_pretrained(llama, precision=precision), False, method)
    assert losses(foreign(llama, precision), True, method) == right


def test_weights_that_are_packed_already_are_refused(llama):
    model = foreign(llama, "nf4")
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.quant_state.packing_format_for_cpu = True
    name = r"model\.layers\.1\.mlp\.up_proj"
    with pytest.raises(
        petune.UnsupportedError,
        match=rf"{name}: an evaluation has packed .*; load the model anew, and attach",
    ):
        petune.attach(model, "lora")
    assert petune.tunings(model) == {}
    assert type(model) is LlamaForCausalLM
    assert all(
        module.support_avx512bf16_for_cpu
        for module in model.modules()
        if isinstance(module, bnb.Linear4bit)
    )


def test_every_quantizer_is_asked_and_dense_models_are_left_alone(llama, monkeypatch):
    asked = []

    class Listener:
        bits = 16.0

        def prepare(self, model: Any) -> None:
            asked.append(type(model))

    table = {name: (Listener(), "test") for name in ("one", "other")}
    monkeypatch.setitem(registry()._found, "petune_quantizers", table)
    petune.attach(foreign(llama, "int8"), "lora")
    assert asked == [LlamaForCausalLM] * 2
    petune.attach(LlamaForCausalLM.from_pretrained(llama), "lora")
    assert len(asked) == 2


def test_what_another_has_left_dense_stays_what_it_computes(tmp_path):
    """transformers has no way to store GPT-2's transposed layers by torchao; petune's own load has."""
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 96}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**sizes, **ends)).save_pretrained(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(
        tmp_path, quantization_config=CONFIGS["int8wo"]
    ).eval()
    with torch.no_grad():
        before = model(IDS).logits
        tuning = petune.attach(model, "lora")
        with tuning.disabled():
            assert torch.equal(model(IDS).logits, before)
        tuning.detach()
        assert torch.equal(model(IDS).logits, before)


def test_a_second_tuning_leaves_what_trains_in_the_first_as_it_is():
    """A trained copy of a layer is no layer of the base, for a quantizer to store in codes."""
    model = tiny_model("gpt2", "int8wo")
    first = petune.attach(model, "full", name="first")
    kept = {key: tensor.clone() for key, tensor in first.state()}
    petune.attach(model, "lora", name="second").detach()
    assert {key: type(tensor) for key, tensor in first.state()} == dict.fromkeys(
        kept, torch.nn.Parameter
    )
    for key, tensor in first.state():
        assert torch.equal(tensor, kept[key])
