"""PEFT's folders that hold more than a method's own tensors, both ways, beside PEFT's own logits."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from shaken import close, shake

import petune
from petune.testing import tiny_batch, tiny_model
from petune.testing.behaviours import logits

pytestmark = pytest.mark.filterwarnings("ignore")
TASKS = {"llama": "CAUSAL_LM", "tied": "CAUSAL_LM", "bert": "SEQ_CLS"}


def _model(family):
    if family != "tied":
        return tiny_model(family)
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _logits(model, family):
    return logits(model, tiny_batch("llama" if family == "tied" else family))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("tied", {"target_modules": ["q_proj", "lm_head"]}),
        ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("tied", {"trainable_token_indices": [3, 5]}),
        ("llama", {"trainable_token_indices": {"embed_tokens": [5, 3]}}),
        ("llama", {"bias": "all"}),
        ("llama", {"init_lora_weights": "eva"}),
        ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
        ("bert", {"target_modules": ["query"], "bias": "all"}),
        ("bert", {"target_modules": "all-linear"}),
    ],
)
def test_what_a_folder_holds_besides_the_method(family, options, tmp_path):
    options = {"target_modules": ["q_proj"], **options}
    config = peft.LoraConfig(r=4, task_type=TASKS[family], **options)
    theirs = peft.get_peft_model(_model(family), config).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = _logits(theirs, family)
    ours = _model(family)
    tuning = petune.load(ours, tmp_path / "theirs")
    close(_logits(ours, family), expected)
    tuning.save(tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(_model(family), tmp_path / "ours").eval()
    close(_logits(again, family), expected)


@pytest.mark.parametrize("method", ["lora", "ia3", "ln-tuning", "oft", "vera"])
def test_a_classifier_whose_head_was_not_trained_loads_in_peft(method, tmp_path):
    ours = tiny_model("bert")
    shake(petune.attach(ours, method, train=[]).parameters())
    petune.tunings(ours)["default"].save(tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path).eval()
    close(_logits(theirs, "bert"), _logits(ours, "bert"))
    fresh = tiny_model("bert")
    assert petune.load(fresh, tmp_path).heads == ()
    close(_logits(fresh, "bert"), _logits(ours, "bert"))


def test_files_that_no_adapter_can_be_made_of(tmp_path):
    petune.attach(tiny_model("llama"), "lora").save(tmp_path, format="peft")
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = min(tensors)
    save_file(tensors | {first: torch.full_like(tensors[first], torch.nan)}, weights)
    model = tiny_model("llama")
    with pytest.raises(petune.PetuneError, match=r"lora_A\.weight' holds NaN"):
        petune.load(model, tmp_path)
    weights.rename(tmp_path / "adapter_model-00001-of-00002.safetensors")
    with pytest.raises(petune.PetuneError, match="keeps an adapter in one file"):
        petune.load(model, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(petune.PetuneError, match="pickle, which petune never opens"):
        petune.load(model, tmp_path)
    assert petune.tunings(model) == {}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_qalora", True),
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"]}),
        ("kasa_config", {"beta": 0.1}),
        ("arrow_config", {"top_k": 1}),
        ("lora_bias", True),
        ("use_what_a_later_peft_has", True),
    ],
)
def test_an_option_that_makes_it_another_method_is_refused_by_name(
    option, value, tmp_path
):
    petune.attach(tiny_model("llama"), "lora").save(tmp_path, format="peft")
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {option: value}))
    model = tiny_model("llama")
    with pytest.raises(petune.UnsupportedError, match=f"PEFT's LORA with {option}="):
        petune.load(model, tmp_path)
    assert petune.tunings(model) == {}
