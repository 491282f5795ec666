"""Loading by name, on models of a few thousand parameters."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
)
from transformers.utils import logging

import petune
from petune import Package, PetuneError, Source
from petune.plugins import registry

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IDS = torch.arange(10)[None]  # (batch, length)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)  # threads that wait for each other take most of the time of a tiny model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders of tiny checkpoints."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=96, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "bert": BertModel(BertConfig(**SIZES)),
        "mlm": BertForMaskedLM(BertConfig(**SIZES)),
        "classifier": BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
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


# --- heads and fresh weights ---


@pytest.mark.parametrize(
    ("name", "head", "cls", "fresh"),
    [
        ("llama", None, "LlamaForCausalLM", ()),
        ("llama", "base", "LlamaModel", ()),
        ("llama", "sequence-classification", "LlamaForSequenceClassification", ("score",)),
        ("bert", None, "BertModel", ()),
        ("bert", "token-classification", "BertForTokenClassification", ("classifier",)),
        ("bert", "question-answering", "BertForQuestionAnswering", ("qa_outputs",)),
        ("mlm", None, "BertForMaskedLM", ()),
        ("mlm", "sequence-classification", "BertForSequenceClassification", ("bert.pooler", "classifier")),
        ("bert", "masked-lm", "BertForMaskedLM", ("cls.predictions.transform",)),
        ("t5", None, "T5ForConditionalGeneration", ()),
        ("t5", "sequence-classification", "T5ForSequenceClassification", ("classification_head",)),
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
    ours, theirs = petune.from_pretrained(saved.llama), LlamaForCausalLM.from_pretrained(saved.llama)
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_fresh_weights_follow_the_seed_and_leave_the_random_state_alone(saved):
    def head(**kwargs: Any) -> torch.Tensor:
        model = petune.from_pretrained(saved.bert, head="sequence-classification", num_labels=4, **kwargs)
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
    with pytest.raises(PetuneError, match="its head has another size; give its num_labels, or ignore_mismatched_sizes"):
        petune.from_pretrained(saved.classifier, num_labels=2)
    model = petune.from_pretrained(saved.classifier, num_labels=2, ignore_mismatched_sizes=True)
    assert model.petune_fresh == ("classifier",)


def test_a_checkpoint_of_another_architecture_is_refused(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved.bert / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(saved.t5 / "model.safetensors")
    with pytest.raises(PetuneError, match="the checkpoint has no weights of a BertModel"):
        petune.from_pretrained(tmp_path)


# --- precision ---


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
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
def test_a_quantizer_is_told_what_surrounds_the_base_and_what_is_new(saved, quantizer, name, head, skip):
    model = petune.from_pretrained(getattr(saved, name), precision="pretend", head=head)
    assert quantizer.asked == [(skip, torch.float32), type(model).__name__]
    assert model.config._attn_implementation == "eager"
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_the_callers_arguments_win_over_a_quantizers(saved, quantizer):
    model = petune.from_pretrained(saved.llama, precision="pretend", dtype=torch.bfloat16, attn_implementation="sdpa")
    assert quantizer.asked[0] == (["lm_head"], torch.bfloat16)
    assert model.config._attn_implementation == "sdpa"
    assert model.dtype == torch.bfloat16


def test_an_unknown_precision_or_head_names_the_near_misses(saved):
    with pytest.raises(PetuneError, match=r"unknown precision 'bf61'\. Did you mean 'bf16'.*Known: .*fp32"):
        petune.from_pretrained(saved.llama, precision="bf61")
    with pytest.raises(PetuneError, match=r"unknown llama head 'causal'\. Did you mean 'causal-lm'.*"):
        petune.from_pretrained(saved.llama, head="causal")
    with pytest.raises(PetuneError, match="unknown bert head 'seq2seq-lm'"):
        petune.from_pretrained(saved.bert, head="seq2seq-lm")


# --- names ---


def test_an_alias_is_fetched_and_a_folder_of_that_name_comes_first(saved, tmp_path, monkeypatch):
    package = Package("tiny", "1.0", "0" * 64, ("pkg/config.json", "pkg/model.safetensors"))
    monkeypatch.setattr(
        Package, "fetch", lambda self, to: [(to / f.name).write_bytes(f.read_bytes()) for f in saved.bert.iterdir()]
    )
    monkeypatch.setitem(registry()._found, "petune_models", {"tiny": (Source((package,)), "test")})
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert type(petune.from_pretrained("tiny")) is BertModel
    (tmp_path / "tiny").mkdir()  # a run's folder of that name, say
    assert type(petune.from_pretrained("tiny")) is BertModel
    for file in saved.llama.iterdir():
        (tmp_path / "tiny" / file.name).write_bytes(file.read_bytes())
    assert type(petune.from_pretrained("tiny")) is LlamaForCausalLM


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere.gguf", "~/nowhere-at-all"])
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
    torch.save(BertModel.from_pretrained(saved.bert).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(PetuneError, match=r"no \.safetensors file, and nothing is ever unpickled"):
        petune.from_pretrained(tmp_path)


def test_a_broken_checkpoint_ends_in_one_line(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved.bert / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(PetuneError, match=r"^[^\n]+$"):
        petune.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PetuneError, match="not a valid JSON file"):
        petune.from_pretrained(tmp_path)


# --- the hub ---


class Hub(BaseHTTPRequestHandler):
    """A hub that knows no model."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def dead_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("load", [petune.from_pretrained, petune.load_tokenizer])
def test_a_name_that_the_hub_does_not_know_gets_near_misses(load):
    with pytest.raises(
        PetuneError, match=r"unknown model 'minilmm'\. Did you mean 'minilm'.*the Hub says: .*[Nn]ot [Ff]ound"
    ):
        load("minilmm")


@pytest.mark.usefixtures("dead_hub")
@pytest.mark.timeout(20)
def test_a_hub_out_of_reach_is_not_waited_for():
    with pytest.raises(PetuneError, match="It is no local folder, and the Hub says: Connect"):
        petune.from_pretrained("someone/something")


@pytest.mark.usefixtures("dead_hub")
@pytest.mark.timeout(20)
def test_a_hub_out_of_reach_leaves_what_was_downloaded_before(saved, tmp_path):
    commit = "1" * 40
    home = tmp_path / "models--someone--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in saved.llama.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert type(petune.from_pretrained("someone/tiny", cache_dir=str(tmp_path))) is LlamaForCausalLM


# --- tokenizers ---


def save_tokenizer(folder: Path, **special: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "[PAD]": 2, "a": 3, "b": 4, "c": 5, "d": 6}, "[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>", **special).save_pretrained(
        folder
    )


@pytest.mark.parametrize(("special", "pad"), [({}, "</s>"), ({"pad_token": "[PAD]"}, "[PAD]")])
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


# --- GGUF ---


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """A Llama of two layers in Q4_1 blocks, as llama.cpp writes one; returns what its numbers say."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(96)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", "<s>", "</s>", "w", "0", "w0", *(f"x{i}" for i in range(90))])
    writer.add_token_types([3, 3, 3] + [1] * 93)
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (96, 64), "output_norm": (64,), "output": (96, 64)}
    for layer in range(2):
        block = {
            "attn_norm": (64,),
            "ffn_norm": (64,),
            "ffn_up": (128, 64),
            "ffn_gate": (128, 64),
            "ffn_down": (64, 128),
        }
        block |= {f"attn_{part}": (64, 64) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    exact = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            packed = quantize(values, GGMLQuantizationType.Q4_1)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=GGMLQuantizationType.Q4_1)
            values = dequantize(packed, GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(f"{name}.weight", values)
        exact[name] = torch.from_numpy(values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


def test_a_gguf_file_is_unpacked_once_and_exactly_and_takes_any_precision(tmp_path, monkeypatch, quantizer, capsys):
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    exact = write_gguf(tmp_path / "tiny.gguf")
    model = petune.from_pretrained(tmp_path / "tiny.gguf")
    assert "petune: unpacking tiny.gguf\n" in capsys.readouterr().err
    assert type(model) is LlamaForCausalLM
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, exact["blk.1.ffn_up"])
    assert torch.equal(model.lm_head.weight, exact["output"])
    assert torch.isfinite(model(IDS).logits).all()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(petune.from_pretrained(tmp_path / "again")(IDS).logits, model(IDS).logits)

    classifier = petune.from_pretrained(tmp_path / "tiny.gguf", precision="pretend", head="sequence-classification")
    assert classifier.petune_fresh == ("score",)
    assert quantizer.asked[0] == (["score"], torch.float32)
    assert len(petune.load_tokenizer(tmp_path / "tiny.gguf")) == 96
    assert "unpacking" not in capsys.readouterr().err

    write_gguf(tmp_path / "tiny.gguf")
    petune.from_pretrained(tmp_path / "tiny.gguf")
    assert "unpacking" in capsys.readouterr().err, "a changed file is another model"


def test_a_file_that_is_no_gguf_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(PetuneError, match=r"^[^\n]*bad\.gguf[^\n]+$"):
        petune.from_pretrained(tmp_path / "bad.gguf")
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("head", [None, "sequence-classification"])
def test_the_real_decoder(head):
    model, tokenizer = petune.from_pretrained("smollm2-135m", head=head), petune.load_tokenizer("smollm2-135m")
    assert isinstance(model, nn.Module)
    if head is None:
        ids = tokenizer("The capital of France is", return_tensors="pt")
        answer = model.generate(**ids, max_new_tokens=3, do_sample=False)
        assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.slow
def test_the_real_encoder():
    model, tokenizer = petune.from_pretrained("minilm"), petune.load_tokenizer("minilm")
    texts = ["A man is playing the guitar.", "Someone plays an instrument.", "The stock market fell."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state  # (batch, length, hidden)
    mask = batch["attention_mask"][..., None]
    a, b, c = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    assert a @ b > 0.5 > a @ c


def test_t5_keeps_a_pretrained_head_out(saved, tmp_path, quantizer):
    T5ForSequenceClassification.from_pretrained(saved.t5, num_labels=2).save_pretrained(tmp_path)
    model = petune.from_pretrained(tmp_path, precision="pretend")
    assert model.petune_fresh == ()
    assert quantizer.asked[0][0] == ["classification_head"]
