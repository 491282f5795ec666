"""PEFT's folders, both ways: the same logits to 1e-5."""

import json

import peft
import pytest
import torch

import petune
from petune.testing import tiny_batch, tiny_model
from petune.testing.behaviours import logits

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "value", "output.dense"],
    "t5": ["q", "v", "wo"],
}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
WHERE = {"llama": "q v down", "gpt2": "q k v down", "bert": "q v o up", "t5": "k o"}
CONFIGS = {
    "lora": lambda family: peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS[family], task_type=TASKS[family]
    ),
    "dora": lambda family: peft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS[family], task_type=TASKS[family]),
    "ia3": lambda family: peft.IA3Config(
        target_modules=TARGETS[family], feedforward_modules=TARGETS[family][-1:], task_type=TASKS[family]
    ),
}


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@torch.no_grad()
def shake(parameters):
    torch.manual_seed(0)
    for p in parameters:
        p.add_(torch.randn_like(p) * 0.1)


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("method", CONFIGS)
def test_what_peft_wrote_loads_here(method, family, tmp_path):
    theirs = peft.get_peft_model(tiny_model(family), CONFIGS[method](family)).eval()
    shake(p for n, p in theirs.named_parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model(family)
    tuning = petune.load(ours, tmp_path)
    assert tuning.method == method
    assert ("classifier" in tuning.heads) == (family == "bert")
    batch = tiny_batch(family)
    close(logits(ours, batch), logits(theirs, batch))
    tuning.save(tmp_path / "again")
    fresh = tiny_model(family)
    petune.load(fresh, tmp_path / "again")
    assert torch.equal(logits(fresh, batch), logits(ours, batch))


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("method", CONFIGS)
def test_what_petune_saved_loads_in_peft(method, family, tmp_path):
    ours = tiny_model(family)
    where = WHERE[family] if method != "ia3" else "q k v down" if family == "gpt2" else None
    tuning = petune.attach(ours, method, where=where, train=["classifier"] if family == "bert" else None)
    shake(tuning.parameters())
    tuning.save(tmp_path, format="peft")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    batch = tiny_batch(family)
    close(logits(theirs, batch), logits(ours, batch))


def test_targets_are_short_names_where_they_can_be(tmp_path):
    """vLLM and llama.cpp expect the modules' last names."""
    tuning = petune.attach(tiny_model("llama"), "lora", where="q v")
    tuning.save(tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("method", "where", "arguments", "message"),
    [
        ("houlsby", None, {}, "PEFT's format has no 'houlsby'"),
        ("lora", "q v", {}, "parts of a fused projection"),
        ("lora", None, {"rank_pattern": {"down": 2}}, "rank_pattern"),
    ],
)
def test_what_peft_can_not_hold_is_refused_before_anything_is_written(method, where, arguments, message, tmp_path):
    tuning = petune.attach(tiny_model("gpt2"), method, where=where, **arguments)
    with pytest.raises(petune.UnsupportedError, match=message):
        tuning.save(tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()
    with pytest.raises(petune.PetuneError, match="Did you mean 'peft'"):
        tuning.save(tmp_path / "out", format="pefft")


@pytest.mark.parametrize(
    "change",
    [
        {"alpha_pattern": {"q": 3}},
        {"peft_type": "HRA"},
        {"init_lora_weights": "pissa"},
    ],
)
def test_a_folder_of_another_method_is_refused(change, tmp_path):
    peft.get_peft_model(tiny_model("llama"), CONFIGS["lora"]("llama")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = tiny_model("llama")
    with pytest.raises(petune.PetuneError, match="no method here is PEFT's"):
        petune.load(model, tmp_path)
    assert petune.tunings(model) == {}
