"""Checkpoints that are not what their configuration says: refused, or said in one line; heads come and go unsaid."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from samples import SMALL

import petune
from petune.errors import PetuneWarning
from petune_bench.coverage import tiny

NAN = float("nan")


def saved(folder, model):
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llama, bert = transformers.LlamaConfig(**SMALL), transformers.BertConfig(**SMALL)
    saved(folder / "llama", transformers.LlamaForCausalLM(llama))
    saved(folder / "bert", transformers.BertModel(bert))
    saved(folder / "masked", transformers.BertForMaskedLM(bert))
    t5 = transformers.T5Config(
        vocab_size=96, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8
    )
    saved(folder / "t5", transformers.T5ForSequenceClassification(t5))
    bart = transformers.BartConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )
    saved(folder / "bart", transformers.BartForConditionalGeneration(bart))
    saved(folder / "sorting", transformers.LlamaForSequenceClassification(llama))
    heads = tiny.architectures()["glm4_moe"]
    routed = tiny.build("glm4_moe", "causal-lm", heads["causal-lm"])
    saved(folder / "routed", routed)
    return folder


@pytest.fixture
def model(request, models, tmp_path):
    return shutil.copytree(models / request.param, tmp_path / "model")


def configured(**changes):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def stored(change):
    def spoil(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def without(key):
    return stored(lambda tensors: tensors.pop(key))


def with_more(key):
    return stored(lambda tensors: tensors.update({key: torch.zeros(2)}))


def with_value(key, value):
    return stored(lambda tensors: tensors[key].view(-1)[:1].fill_(value))


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SAID = [
    ("llama", {}, configured(num_hidden_layers=1), "model.layers.1.input_layernorm.weight and 8 more, for which"),
    ("bert", {}, configured(num_hidden_layers=1), "encoder.layer.1.attention.output.LayerNorm.bias and 15 more"),
    ("bert", {"head": "sequence-classification"}, configured(num_hidden_layers=1), " and 15 more, for which"),
    ("llama", {}, with_more("model.layers.0.self_attn.q_proj.bias"), "model.layers.0.self_attn.q_proj.bias, for which"),
    ("llama", {}, with_more("model.norm.bias"), "model.norm.bias, for which"),
    ("llama", {}, without(NORM), f"no {NORM}, which its config.json asks for: drawn anew"),
    ("llama", {}, without("model.embed_tokens.weight"), "no model.embed_tokens.weight, which"),
    ("llama", {}, without("lm_head.weight"), "no lm_head.weight, which"),
    ("bart", {"head": "causal-lm"}, lambda folder: None, "no model.decoder.embed_tokens.weight, which"),
    ("llama", {"num_hidden_layers": 1}, lambda folder: None, " and 8 more, for which"),
    (
        "bert", {"head": "masked-lm"},
        stored(lambda tensors: [tensors.pop(f"embeddings.LayerNorm.{key}") for key in ("bias", "weight")]),
        "no bert.embeddings.LayerNorm.bias and 1 more, which",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "options", "spoil", "line"), SAID, indirect=["model"]
)
def test_what_is_left_out_or_drawn_is_said(model, options, spoil, line):
    spoil(model)
    with pytest.warns(PetuneWarning) as said:
        petune.from_pretrained(model, **options)
    (message,) = [str(one.message) for one in said if one.category is PetuneWarning]
    assert message.startswith(f"{model}: the checkpoint has ")
    assert line in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("model", "head"),
    [
        ("llama", None),
        ("llama", "sequence-classification"),
        ("llama", "base"),
        ("sorting", "causal-lm"),
        ("bert", None),
        ("bert", "masked-lm"),
        ("bert", "token-classification"),
        ("masked", None),
        ("masked", "sequence-classification"),
        ("masked", "base"),
        ("routed", "causal-lm"),
        ("t5", "question-answering"),
        ("bart", "seq2seq-lm"),
        ("bart", "sequence-classification"),
    ],
    indirect=["model"],
)
def test_heads_come_and_go_unsaid(model, head):
    with warnings.catch_warnings():
        warnings.simplefilter("error", PetuneWarning)
        petune.from_pretrained(model, head=head)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 10}, r"embed_tokens.weight is \(96, 64\), .* it \(10, 64\)"),
        ({"intermediate_size": 64}, r"down_proj.weight is \(64, 128\)"),
    ],
)
def test_only_a_head_of_another_size_gives_way(model, changes, words):
    options = {"head": "sequence-classification", "ignore_mismatched_sizes": True}
    petune.from_pretrained(model, num_labels=5, **options).save_pretrained(model)
    other = petune.from_pretrained(model, num_labels=3, **options)
    assert (other.score.weight.shape, other.petune_fresh) == ((3, 64), ("score",))
    configured(**changes)(model)
    with pytest.raises(petune.PetuneError, match=words):
        petune.from_pretrained(model, **options)


@pytest.mark.parametrize(
    ("model", "spoil", "words"),
    [
        ("llama", configured(num_hidden_layers=3), "has no model.layers.2."),
        ("llama", configured(pad_token_id=99999), "Padding_idx must be within"),
        ("llama", without(UP), f"has no {UP}, which its config.json asks for"),
        ("llama", with_value(NORM, NAN), f"{NORM} holds NaN"),
        ("llama", with_value(UP, -float("inf")), f"{UP} holds NaN or infinite"),
        ("routed", with_value(BIAS, NAN), f"{BIAS} holds NaN or infinite numbers"),
    ],
    indirect=["model"],
)
def test_what_no_model_can_be_made_of_is_refused(model, spoil, words):
    spoil(model)
    with pytest.raises(petune.PetuneError, match=words) as caught:
        petune.from_pretrained(model)
    assert "\n" not in str(caught.value)
