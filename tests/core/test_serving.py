"""What serving engines read of a folder: LoRA with one rank and one alpha, its scale in the matrices."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from shaken import close, shaken

import petune
from petune.testing import tiny_batch, tiny_model
from petune.testing.behaviours import logits


def engine(folder, model):
    """A base served with the folder as vLLM and llama.cpp read it: r, alpha and two matrices a module, nothing else."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["bias"] == "none"
    assert not any(
        config[k]
        for k in (
            "use_dora",
            "use_rslora",
            "modules_to_save",
            "rank_pattern",
            "alpha_pattern",
        )
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        name, matrix, weight = key.rsplit(".", 2)
        assert (name.startswith("base_model.model."), weight) == (True, "weight")
        assert tensor.shape[matrix == "lora_B"] == config["r"]
        assert any(
            f".{name}".endswith(f".{target}") for target in config["target_modules"]
        )
        assert tensor.is_contiguous()
        if matrix == "lora_A":
            module = model.get_submodule(name.removeprefix("base_model.model."))
            delta = (
                tensors[f"{name}.lora_B.weight"]
                @ tensor
                * config["lora_alpha"]
                / config["r"]
            )
            with torch.no_grad():
                module.weight += (
                    delta if isinstance(module, torch.nn.Linear) else delta.T
                )
    return model


CASES = {
    "plain": ("llama", "q v down", {"rank": 4}),
    "rslora": ("llama", None, {"rank": 4, "rslora": True}),
    "patterns": (
        "llama",
        "q v down",
        {"rank_pattern": {"q": 3}, "alpha_pattern": {"*.1.*": 40.0}},
    ),
    "pissa": ("llama", "q v down", {"rank": 4, "init": "pissa"}),
    "parts": ("gpt2", "q v down", {"rank": 4}),
    "whole": ("gpt2", "q k v up", {"rank": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_serves_the_same(case, tmp_path):
    family, where, arguments = CASES[case]
    model = tiny_model(family)
    shaken(model, "lora", where=where, **arguments).save(tmp_path, format="serving")
    want = logits(model, tiny_batch(family))
    close(logits(engine(tmp_path, tiny_model(family)), tiny_batch(family)), want)
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    close(logits(theirs, tiny_batch(family)), want)
    ours = tiny_model(family)
    petune.load(ours, tmp_path)
    close(logits(ours, tiny_batch(family)), want)


@pytest.mark.parametrize(
    ("method", "train", "message"),
    [
        ("dora", None, "lora_magnitude_vector"),
        ("ia3", None, "ia3_l"),
        ("houlsby", None, "no 'houlsby'"),
        ("lora", ["lm_head"], "a head that was trained along"),
    ],
)
def test_what_they_can_not_read_is_refused(method, train, message, tmp_path):
    tuning = petune.attach(tiny_model("llama"), method, train=train)
    with pytest.raises(petune.UnsupportedError, match=message):
        tuning.save(tmp_path / "out", format="serving")
    assert not (tmp_path / "out").exists()
