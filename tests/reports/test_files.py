"""Files that are not what they should be: each is refused in one line, and the model stays as it was."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import SMALL, save_tokenizer, write_gguf
from shaken import moved
from transformers import LlamaConfig, LlamaForCausalLM

import petune
from petune.cli.app import main
from petune.core.host.seams import SEAMS
from petune.core.registry.plugins import Plugin, registry
from petune.errors import PetuneWarning
from petune.testing import tiny_batch, tiny_model
from petune.testing.behaviours import logits
from petune.training import Result, load_recipe, load_run

Spoil = Callable[[Path], Any]
Q = "model.layers.0.self_attn.q_proj"


def config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "adapter.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def arguments(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        said = json.loads((folder / "adapter.json").read_text())["arguments"]
        config(arguments=said | changes)(folder)

    return spoil


def tensor(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = next(folder.glob("*.safetensors"))
        tensors = load_file(path)
        tensors[key] = change(tensors[key])
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def text(name: str, content: str | bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        raw = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(raw)

    return spoil


def cut(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[:-100])

    return spoil


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(old: torch.Tensor) -> torch.Tensor:
        old.view(-1)[5] = value
        return old

    return change


def deep(folder: Path) -> None:
    path = folder / "adapter.json"
    nested = "[" * 10_000 + "]" * 10_000
    path.write_text(path.read_text().replace('"alpha": 16.0', f'"alpha": {nested}'))


def doubled(folder: Path) -> None:
    path = folder / "adapter.json"
    path.write_text(path.read_text().replace('"rank": 8', '"rank": 4, "rank": 8'))


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    moved("lora", where="q v")[1].save(folder)
    return folder


REFUSED: list[tuple[Spoil, str]] = [
    (text("adapter.json", "[" * 10_000), r"adapter\.json: its JSON is nested too deep"),
    (deep, r"adapter\.json: its JSON is nested too deeply"),
    (text("adapter.json", "{"), r"adapter\.json: not JSON"),
    (text("adapter.json", "{}"), "is not a tuning's: it has no 'arguments'"),
    (text("adapter.json", "[1, 2]"), r"adapter\.json: not a JSON object"),
    (text("adapter.json", bytes(range(256))), r"adapter\.json: not JSON"),
    (config(arguments=[]), "'arguments': Input should be an object, not "),
    (config(where=3), "'where': Input should be a valid string, not 3"),
    (config(where="q"), "v_proj.A', which this model has no place for"),
    (config(where="q v o"), "it has no 'model.layers.0.self_attn.o_proj.A'"),
    (config(where="zz"), "unknown role or name 'zz'"),
    (config(train="lm_head"), "'train': Input should be a valid array"),
    (config(train=["zz"]), "unknown module to train: 'zz'"),
    (config(train=[Q]), f"{Q} is adapted, and among what trains along"),
    (config(weight="1"), "'weight': Input should be a valid number, not '1'"),
    (config(weight=1e39), r"weight=1e\+39 of tuning 'default': wanted is a finite"),
    (text("adapter.json", '{"petune": 1, "petune": 1}'), "'petune' is given twice"),
    (doubled, r"not JSON \(the key 'rank' is given twice"),
    (config(weight=float("nan")), "one of its numbers is NaN or infinite"),
    (config(wieght=1), "unknown key 'wieght'. Did you mean 'weight'"),
    (config(petune=99), "format 99 is newer than this petune; upgrade it"),
    (config(petune="1"), "format '1' is none; this petune reads 1"),
    (config(method="gone"), "unknown method 'gone'"),
    (config(method=["lora"]), "with several methods, where="),
    (arguments(rank="8"), "method 'lora': rank='8' is no int"),
    (arguments(rank=True), "method 'lora': rank=True is no int"),
    (arguments(rslora=1), "method 'lora': rslora=1 is no bool"),
    (arguments(rank=-1), "method 'lora': rank=-1: Input should be greater than 0"),
    (arguments(rank=None), "method 'lora': rank=None"),
    (arguments(alpha=float("inf")), "one of its numbers is NaN or infinite"),
    (arguments(name="x"), "unknown argument of method 'lora': 'name'"),
    (arguments(rank_pattern={"zz": 4}), "'zz' matches none of the sites adapted"),
    (
        arguments(rank=4),
        rf"'{Q}.A' is \(8, 64\), the model needs \(4, 64\)",
    ),
    (
        arguments(rank=10**9),
        rf"adapter\.safetensors does not fit .*'{Q}.A' is \(8, 64\), .*\(1000000000, 64\)",
    ),
    (
        arguments(rank_pattern={"q": 10**9}),
        rf"'{Q}.A' is \(8, 64\), the model needs \(1000000000, 64\)",
    ),
    (arguments(rank=10**30), r"adapter\.json: arguments .*Overflow"),
    (tensor(f"{Q}.A", put(float("nan"))), f"'{Q}.A' holds NaN or infinite numbers"),
    (tensor(f"{Q}.B", put(float("-inf"))), f"'{Q}.B' holds NaN or infinite numbers"),
    (
        tensor(f"{Q}.A", lambda old: old.double() * 0 + 1e300),
        f"'{Q}.A' holds NaN or infinite numbers",
    ),
    (
        tensor(f"{Q}.A", torch.Tensor.int),
        f"'{Q}.A' does not hold floating-point numbers",
    ),
    (
        tensor(f"{Q}.A", torch.Tensor.bool),
        f"'{Q}.A' does not hold floating-point numbers",
    ),
    (
        tensor(f"{Q}.A", lambda old: old.T.contiguous()),
        r"is \(64, 8\), the model needs \(8, 64\)",
    ),
    (cut("adapter.safetensors"), r"adapter\.safetensors is damaged"),
    (text("adapter.safetensors", b"\xff" * 500), r"adapter\.safetensors is damaged"),
    (text("adapter.safetensors", b""), r"adapter\.safetensors is damaged"),
    (
        lambda folder: torch.save({"A": 1}, folder / "adapter.safetensors"),
        r"adapter\.safetensors is damaged",
    ),
    (
        lambda folder: (folder / "adapter.safetensors").unlink(),
        r"adapter\.safetensors: no such file",
    ),
    (lambda folder: (folder / "adapter.json").unlink(), "so no tuning"),
    (a_file, "so no tuning"),
    (shutil.rmtree, "so no tuning"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED)
def test_a_spoilt_tuning_is_refused_in_one_line(lora, tmp_path, spoil, message):
    folder = shutil.copytree(lora, tmp_path / "out")
    spoil(folder)
    model = tiny_model("llama")
    before = logits(model, tiny_batch("llama"))
    asked = [p.requires_grad for p in model.parameters()]
    with pytest.raises(petune.PetuneError, match=message) as caught:
        petune.load(model, folder)
    assert "\n" not in str(caught.value)
    assert (type(model), petune.tunings(model)) == (LlamaForCausalLM, {})
    assert [p.requires_grad for p in model.parameters()] == asked
    assert torch.equal(logits(model, tiny_batch("llama")), before)


@pytest.mark.parametrize(
    ("method", "argument", "more"),
    [
        ("dora", "rank", {}),
        ("vera", "rank", {}),
        ("adalora", "rank", {}),
        ("prefix-tuning", "length", {}),
        ("prefix-tuning", "hidden", {"hidden": 8}),
        ("prompt-tuning", "length", {}),
        ("p-tuning", "hidden", {}),
        ("llama-adapter", "length", {}),
        ("houlsby", "width", {}),
    ],
)
def test_no_method_gets_memory_for_what_its_file_does_not_hold(
    tmp_path, method, argument, more
):
    moved(method, **more)[1].save(tmp_path)
    arguments(**{argument: 10**9})(tmp_path)
    with pytest.raises(petune.PetuneError, match=r", the model needs \(.*1000000000"):
        petune.load(tiny_model("llama"), tmp_path)


def test_nor_does_one_whose_shapes_are_not_known_before(tmp_path, monkeypatch):
    """As PEFT's layers, which can't be made without memory."""
    moved("lora")[1].save(tmp_path)
    arguments(rank=10**9)(tmp_path)
    from petune.core.attached import load

    monkeypatch.delattr(load, "planned")
    with pytest.raises(petune.PetuneError, match=r"tensor of shape \(1000000000, 64\)"):
        petune.load(tiny_model("llama"), tmp_path)


@pytest.mark.parametrize(
    ("method", "key", "shape"),
    [
        ("lora", "r", r"\(1000000000, 64\)"),
        ("prompt-tuning", "num_virtual_tokens", r"\(1000000000,\)"),
    ],
)
def test_nor_does_a_folder_of_pefts(tmp_path, method, key, shape):
    moved(method)[1].save(tmp_path, format="peft")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 10**9}))
    model = tiny_model("llama")
    with pytest.raises(
        petune.PetuneError, match=rf"adapter_config\.json.* of shape {shape}"
    ):
        petune.load(model, tmp_path)
    assert petune.tunings(model) == {}


def test_nan_in_a_folder_of_pefts_is_refused_by_its_name(tmp_path):
    moved("lora")[1].save(tmp_path, format="peft")
    name = f"base_model.model.{Q}.lora_A.weight"
    tensor(name, put(float("nan")))(tmp_path)
    with pytest.raises(petune.PetuneError, match=f"'{name}' holds NaN"):
        petune.load(tiny_model("llama"), tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_another_architecture_is_refused(lora, family):
    model = tiny_model(family)
    with pytest.raises(petune.PetuneError, match="does not fit this model"):
        petune.load(model, lora)
    assert petune.tunings(model) == {}


def test_another_width_is_refused_with_both_shapes(lora):
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "hidden_size": 32}))
    with pytest.raises(
        petune.PetuneError, match=r"is \(8, 64\), the model needs \(8, 32\)"
    ):
        petune.load(model, lora)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("format", ["petune", "peft"])
@pytest.mark.parametrize("kind", [str, Path])
def test_home_is_found_by_every_function(home, format, kind, single_files):
    model, tuning = moved("lora")
    tuning.save(kind("~/out"), format=format)
    assert (home / "out").is_dir()
    expected = logits(model, tiny_batch("llama"))
    tuning.detach()
    save_tokenizer(home / "model")
    model.save_pretrained(home / "model")
    again = petune.from_pretrained(kind("~/model"), cache_dir=kind("~/cache"))
    petune.load(again, kind("~/out"))
    torch.testing.assert_close(logits(again, tiny_batch("llama")), expected)
    assert petune.load_tokenizer(kind("~/model")).pad_token == "[PAD]"
    (home / "scaled.py").write_text(SCALED.format(where="q", factor=1.0, more=""))
    registry().add_file(kind("~/scaled.py"))
    assert petune.attach(again, "scaled", name="other").method == "scaled"
    assert not Path("~").exists()


@pytest.mark.parametrize(
    "use",
    [
        lambda path: moved("lora")[1].save(path),
        lambda path: petune.load(tiny_model("llama"), path),
        petune.from_pretrained,
        petune.load_tokenizer,
        lambda path: registry().add_file(path),
        load_run,
        load_recipe,
        Result.read,
    ],
)
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("~nobody-here/x", "no home folder of ~nobody-here"),
        ("a\0b", "no NUL character"),
        (3, "3 is no path"),
        (None, "None is no path"),
    ],
)
def test_paths_that_no_system_has(use, path, words):
    with pytest.raises(petune.PetuneError, match=words) as caught:
        use(path)
    assert "\n" not in str(caught.value)


SCALED = """
import petune
from torch import nn, zeros

class Scaled(petune.Adapter):
    where = "{where}"

    def __init__(self, site, *, factor: float = {factor}{more}):
        super().__init__()
        self.gain, self.factor = nn.Parameter(zeros(site.out_features)), factor

    def forward(self, inner, x):
        return inner(x) * (1 + self.factor * self.gain)

@petune.hookimpl
def petune_methods():
    return {{"scaled": Scaled}}
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Any:
    """Install a version of a plugin in place of the one before."""

    def install(version: str, **changes: Any) -> None:
        registry.cache_clear()
        path = tmp_path / "scaled.py"
        said = {"where": "q v", "factor": 2.0, "more": ""} | changes
        path.write_text(SCALED.format(**said))
        sys.modules.pop("petune_file_scaled", None)
        registry().add_file(path)
        registry().plugins["scaled"] = Plugin("scaled", "scaled", version)

    yield install
    registry.cache_clear()


def loaded_logits(folder: Path) -> torch.Tensor:
    model = tiny_model("llama")
    petune.load(model, folder)
    return logits(model, tiny_batch("llama"))


def test_a_plugins_new_default_leaves_old_tunings_as_they_were(plugin, tmp_path):
    plugin("1.0")
    model, tuning = moved("scaled")
    tuning.save(tmp_path / "out")
    expected = logits(model, tiny_batch("llama"))
    plugin("1.0", factor=0.5, where="q v o")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PetuneWarning)
        assert torch.equal(loaded_logits(tmp_path / "out"), expected)
    said = json.loads((tmp_path / "out" / "adapter.json").read_text())
    assert said["arguments"] == {"factor": 2.0}
    assert (said["plugins"], said["version"]) == (
        {"scaled": "scaled 1.0"},
        petune.__version__,
    )


def test_a_difference_that_matters_is_said_in_one_line(plugin, tmp_path):
    plugin("1.0")
    moved("scaled")[1].save(tmp_path / "out")
    plugin("2.0", more=", shift: float = 0.0")
    was = r"'scaled' was saved with plugin scaled 1\.0, here is scaled 2\.0"
    new = r"'scaled' did not have 'shift' then, here it is 0\.0"
    with pytest.warns(PetuneWarning, match=f"adapter.json: {was}; {new}; ") as said:
        loaded_logits(tmp_path / "out")
    assert "\n" not in str(said[0].message)


def test_the_command_line_says_it_too(capsys, monkeypatch):
    from petune.cli import app

    def warning() -> None:
        warnings.warn("of a library", UserWarning, stacklevel=1)
        warnings.warn("another plugin", PetuneWarning, stacklevel=1)

    monkeypatch.setattr(app, "COMMANDS", {**app.COMMANDS, "doctor": warning})
    assert main(["doctor"]) == 0
    assert capsys.readouterr().err == "petune: another plugin\n"


def test_a_file_of_the_older_form_loads(lora, tmp_path):
    folder = shutil.copytree(lora, tmp_path / "out")
    expected = loaded_logits(folder)
    path = folder / "adapter.json"
    new = json.loads(path.read_text())
    keys = ("petune", "method", "where", "train", "base", "architecture")
    old = {key: new[key] for key in keys} | {"arguments": {}}
    path.write_text(json.dumps(old), encoding="utf-8-sig")  # as an editor may save it
    with warnings.catch_warnings():
        warnings.simplefilter("error", PetuneWarning)
        assert torch.equal(loaded_logits(folder), expected)


def test_the_first_load_of_a_process_is_as_any_other(lora, tmp_path, monkeypatch):
    monkeypatch.setattr(SEAMS, "checked", False)
    expected = loaded_logits(lora)
    assert torch.equal(loaded_logits(lora), expected)


def test_a_loaded_tuning_saves_the_same_bytes(lora, tmp_path):
    petune.load(tiny_model("llama"), lora).save(tmp_path)
    for name in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / name).read_bytes() == (lora / name).read_bytes()


def test_a_folder_that_is_a_file_is_not_written_to(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(petune.PetuneError, match=r"out: File exists"):
        moved("lora")[1].save(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def setting(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def without(key: str) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[key]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


UP = "model.layers.1.mlp.up_proj.weight"
MODELS: list[tuple[Spoil, dict[str, Any], str]] = [
    (text("config.json", "[" * 10_000), {}, "JSON files is nested too deeply"),
    (text("generation_config.json", "[" * 10_000), {}, "nested too deeply"),
    (text("config.json", "[]"), {}, "Unrecognized model"),
    (setting(hidden_size="64"), {}, "'hidden_size' expected int, got str"),
    (setting(num_attention_heads=0), {}, "can't load it .ZeroDivisionError"),
    (setting(hidden_act="zzz"), {}, "can't load it .KeyError: 'zzz'"),
    (
        setting(vocab_size=10**12),
        {},
        r"lm_head.weight is \(96, 64\), its config.json makes it \(1000000000000, 64\)",
    ),
    (setting(num_hidden_layers=3), {}, r"the checkpoint has no model\.layers\.2\."),
    (without(UP), {}, f"the checkpoint has no {UP}"),
    (
        tensor(UP, lambda old: old[:, :32].contiguous()),
        {},
        rf"{UP} is \(128, 32\), its config.json makes it \(128, 64\)",
    ),
    *(
        (tensor(UP, put(value)), {"precision": precision}, f"{UP} holds NaN or infinit")
        for value in (float("nan"), float("inf"))
        for precision in ("fp32", "bf16", "nf4", "int8", "int8wo")
    ),
    (tensor(UP, put(1e38)), {"precision": "fp16"}, "at fp16; .*, or load it at fp32"),
    (tensor("model.norm.weight", put(float("nan"))), {}, r"model\.norm\.weight holds"),
    (cut("model.safetensors"), {}, "incomplete metadata"),
    (text("model.safetensors", b"\xff" * 500), {}, "header too large"),
    (lambda folder: None, {"use_safetensors": False}, "nothing is ever unpickled"),
]


@pytest.mark.parametrize(("spoil", "options", "message"), MODELS)
def test_a_spoilt_model_is_refused_in_one_line(
    checkpoint, tmp_path, spoil, options, message
):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    spoil(folder)
    with pytest.raises(petune.PetuneError, match=message) as caught:
        petune.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "[" * 10_000),
        ("tokenizer_config.json", "[" * 10_000),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_spoilt_tokenizer_is_refused_in_one_line(checkpoint, tmp_path, name, content):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / name).write_text(content)
    with pytest.raises(petune.PetuneError, match=r"^[^\n]+$"):
        petune.load_tokenizer(folder)


def test_code_that_comes_with_a_model_is_not_run(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    setting(model_type="own", auto_map={"AutoConfig": "own.Config"})(folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(petune.PetuneError, match=r"^[^\n]+$"):
        petune.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "spoilt",
    [b"", b"nothing of the kind", b"GGUF" + b"\xff" * 500, "half", "other"],
    ids=["empty", "junk", "magic", "half", "other"],
)
def test_a_broken_gguf_file_is_one_line_and_no_other(
    tmp_path, monkeypatch, capfd, spoilt
):
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "bad.gguf")
    whole = (tmp_path / "bad.gguf").read_bytes()
    known = {"half": whole[: len(whole) // 2], "other": whole.replace(b"llama", b"zzz")}
    (tmp_path / "bad.gguf").write_bytes(known.get(spoilt, spoilt))
    with pytest.raises(petune.PetuneError, match=r"^[^\n]*bad\.gguf[^\n]+$"):
        petune.from_pretrained(tmp_path / "bad.gguf")
    assert capfd.readouterr().err == ""
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


def test_a_gguf_file_that_holds_nan_is_refused_by_the_tensors_name(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "nan.gguf")
    whole = (tmp_path / "nan.gguf").read_bytes()
    (tmp_path / "nan.gguf").write_bytes(whole[:-300] + b"\xff\x7f" * 150)
    with pytest.raises(petune.PetuneError, match=r"\.weight holds NaN or infinite"):
        petune.from_pretrained(tmp_path / "nan.gguf")
