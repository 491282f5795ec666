"""The same numbers as PEFT from the same adapter weights."""

import peft
import pytest
import torch

import petune
from petune.testing import tiny_batch, tiny_model
from petune.testing.behaviours import logits

TARGETS = {
    "llama": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "gpt2": "c_attn c_proj c_fc",
    "bert": "query key value dense",
    "t5": "q k v o wi wo",
}


def peft_layer(model, name):
    return model.base_model.model.get_submodule(name.partition("#")[0])


@pytest.mark.parametrize("family", TARGETS)
@torch.no_grad()
def test_lora(family):
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS[family].split(), exclude_modules=".*pooler.*")
    theirs = peft.get_peft_model(tiny_model(family), config).eval()
    ours = tiny_model(family)
    tuning = petune.attach(ours, "lora", rank=8, alpha=16)
    for name, adapter in tuning.adapters.items():
        layer = peft_layer(theirs, name)
        layer.lora_B["default"].weight.normal_(std=0.1)
        adapter.A.copy_(layer.lora_A["default"].weight)
        adapter.B.copy_(layer.lora_B["default"].weight)
    batch = tiny_batch(family)
    got, want = logits(ours, batch), logits(theirs, batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@torch.no_grad()
def test_ia3():
    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    theirs, ours = peft.get_peft_model(tiny_model("llama"), config).eval(), tiny_model("llama")
    for name, adapter in petune.attach(ours, "ia3").adapters.items():
        vector = peft_layer(theirs, name).ia3_l["default"]
        vector.normal_(1, 0.3)
        adapter.scale.copy_(vector.flatten())
    batch = tiny_batch("llama")
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_prompt_tuning(family):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    theirs, ours = peft.get_peft_model(tiny_model(family), config).eval(), tiny_model(family)
    rows = theirs.prompt_encoder["default"].embedding.weight
    petune.attach(ours, "prompt-tuning", length=6).adapters["prompt"].rows.copy_(rows)
    batch = {k: v for k, v in tiny_batch(family).items() if k != "labels"}
    want = theirs(**batch).logits[:, -10:][batch["attention_mask"].bool()]
    torch.testing.assert_close(logits(ours, batch), want, rtol=1e-5, atol=1e-4)
