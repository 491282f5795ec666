"""PEFT's folders that hold more than a method's own tensors, both ways, beside PEFT's own logits."""

import copy
import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from shaken import close, shake

import petune
from petune.errors import PetuneWarning
from petune.testing import tiny_batch, tiny_model
from petune.testing.behaviours import logits

WEIGHTS = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
BUILT = {
    "bart": ("Bart", {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1}),
    "gemma": ("Gemma", {"tie_word_embeddings": True}),
    "mixtral": ("Mixtral", EXPERTS),
    "gpt-oss": ("GptOss", EXPERTS),
}
"""Families that have no tiny model: the start of their classes' names, and what their configurations say besides."""
ALWAYS = ("peft_type", "task_type", "target_modules")
TASKS = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


def _model(family):
    if family in BUILT:
        return _built(family)
    if family != "tied":
        return tiny_model(family)
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _built(family):
    name, more = BUILT[family]
    config = getattr(transformers, f"{name}Config")(**SIZE, **more)
    task = "SequenceClassification" if name == "Bart" else "CausalLM"
    torch.manual_seed(0)
    return getattr(transformers, f"{name}For{task}")(config).eval()


def _batch(family):
    return tiny_batch(family if family in (*TASKS, "gpt2") else "llama")


def _logits(model, family):
    return logits(model, _batch(family))


@torch.no_grad()
def _of_peft(model, family):
    """PEFT's logits at the tokens: those at the virtual tokens of a decoder it leaves in."""
    batch = _batch(family)
    if family in TASKS or not model.active_peft_config.is_prompt_learning:
        return logits(model, batch)
    out = model(**{key: t for key, t in batch.items() if key != "labels"}).logits
    return out[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]


def _saved_by_peft(family, config, folder):
    """What PEFT computes with an adapter that has been moved off its start, and is in the folder."""
    theirs = peft.get_peft_model(_model(family), config).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(folder)
    return _of_peft(theirs, family)


def _loaded_by_peft(family, folder):
    theirs = peft.PeftModel.from_pretrained(_model(family), folder).eval()
    return _of_peft(theirs, family)


def _both_ways(family, config, folder):
    """What PEFT has saved loads here, what petune saves of that loads there and here."""
    expected = _saved_by_peft(family, config, folder / "theirs")
    assert (_logits(_model(family), family) - expected).abs().max() > 1e-4
    ours, again = _model(family), _model(family)
    tuning = petune.load(ours, folder / "theirs")
    close(_logits(ours, family), expected)
    tuning.save(folder / "ours", format="peft")
    close(_loaded_by_peft(family, folder / "ours"), expected)
    petune.load(again, folder / "ours")
    close(_logits(again, family), expected)
    return tuning


def _lora(family, **options):
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **options}
    return peft.LoraConfig(task_type=TASKS.get(family, "CAUSAL_LM"), **options)


TOKENS = [81, 10]
EMBED = {"target_modules": ["embed_tokens", "q_proj"]}
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("tied", {"target_modules": ["q_proj", "lm_head"]}),
        ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("bert", {"target_modules": ["query"], "modules_to_save": ["pooler"]}),
        ("llama", {"bias": "all"}),
        ("llama", {"init_lora_weights": "eva"}),
        ("llama", {"init_lora_weights": "mica"}),
        ("llama", {"init_lora_weights": "olora"}),
        ("llama", {"init_lora_weights": "pissa", "rank_pattern": {"1.*q_proj": 3}}),
        ("llama", {"init_lora_weights": "pissa", "use_dora": True}),
        ("gpt2", {"init_lora_weights": "pissa", "target_modules": ["c_attn"]}),
        ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
        ("bert", {"target_modules": ["query"], "bias": "all"}),
        ("bert", {"target_modules": "all-linear"}),
        ("bert", {"target_modules": ["query"], "lora_bias": True}),
        ("llama", {"lora_bias": True, "use_rslora": True}),
    ],
)
def test_what_a_folder_of_lora_holds_besides(family, options, tmp_path):
    _both_ways(family, _lora(family, **options), tmp_path)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", EMBED),
        ("llama", EMBED | {"target_modules": ["embed_tokens"]}),
        ("llama", EMBED | {"rank_pattern": {"embed_tokens": 2}, "use_rslora": True}),
        ("llama", EMBED | {"trainable_token_indices": {"lm_head": TOKENS}}),
        ("tied", EMBED),
        ("tied", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("tied", EMBED | {"ensure_weight_tying": True}),
        ("gemma", EMBED),
        ("llama", EMBED | {"use_dora": True}),
        ("gemma", EMBED | {"use_dora": True}),
        ("tied", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
        ("gpt2", {"target_modules": ["wte", "c_attn"]}),
        ("bert", {"target_modules": ["word_embeddings", "query"]}),
        ("t5", {"target_modules": ["embed_tokens", "q"]}),
        ("t5", {"target_modules": ["encoder.embed_tokens"]}),
    ],
)
def test_lora_at_embeddings(family, options, tmp_path):
    _both_ways(family, _lora(family, **options), tmp_path)


@pytest.mark.parametrize(
    ("family", "listed"),
    [
        ("llama", TOKENS),
        ("tied", TOKENS),
        ("gemma", TOKENS),
        ("llama", {"embed_tokens": TOKENS[::-1]}),
        ("llama", {"lm_head": TOKENS}),
        ("llama", {"embed_tokens": TOKENS, "lm_head": TOKENS}),
        ("llama", {"embed_tokens": TOKENS, "lm_head": [59]}),
        ("tied", {"embed_tokens": TOKENS, "lm_head": [59]}),
        ("tied", {"lm_head": [59]}),
        ("t5", {"shared": TOKENS}),
        ("t5", {"lm_head": TOKENS}),
    ],
)
def test_tokens_of_tables_tied_or_not(family, listed, tmp_path):
    target = ["q"] if family == "t5" else ["q_proj"]
    config = _lora(family, target_modules=target, trainable_token_indices=listed)
    _both_ways(family, config, tmp_path)


@pytest.mark.parametrize(
    "target", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]]
)
def test_tokens_without_another_method(target, tmp_path):
    config = peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=target)
    _both_ways("llama", config, tmp_path)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"target_parameters": [GATE_UP, DOWN]}),
        ("mixtral", {"target_parameters": [DOWN], "target_modules": []}),
        ("mixtral", {"target_parameters": [f"0.{GATE_UP}", f"1.{DOWN}"]}),
        ("mixtral", {"target_parameters": [GATE_UP, DOWN], "rank_pattern": {DOWN: 2}}),
        ("gpt-oss", {"target_parameters": [GATE_UP, DOWN], "use_rslora": True}),
        ("llama", {"target_parameters": ["v_proj.weight"]}),
        # to PEFT also the experts and the routers, which are parameters
        ("mixtral", {"target_modules": "all-linear", "use_rslora": True}),
    ],
)
def test_parameters_of_experts(family, options, tmp_path):
    _both_ways(family, _lora(family, **options), tmp_path)


PATTERNS = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {r".*\.1\..*q_proj": 9}}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Lora", {"r": 4, **PATTERNS}),
        ("LoHa", {"r": 4, "alpha": 6, **PATTERNS}),
        ("LoKr", {"r": 2, "alpha": 6, **PATTERNS}),
        ("LoKr", {"r": 2, "decompose_both": True}),
        ("LoKr", {"r": 2, "decompose_both": True, "decompose_factor": 16}),
        ("LoKr", {"r": 64, "decompose_both": True, "rank_pattern": {"q_proj": 3}}),
        ("LoKr", {"r": 2, "decompose_factor": 100}),
        ("OFT", {"r": 4, "oft_block_size": 0}),
        ("OFT", {"r": 4, "oft_block_size": 0, "block_share": True}),
        ("OFT", {"oft_block_size": 24}),
        ("OFT", {"oft_block_size": 8, "block_share": True}),
        ("OFT", {"oft_block_size": 8, "coft": True, "eps": 0.1}),
        (
            "OFT",
            {"oft_block_size": 8, "coft": True, "eps": 0.3, "block_share": True},
        ),
        ("OFT", {"oft_block_size": 8, "use_cayley_neumann": False}),
        ("BOFT", {"boft_block_size": 0, "boft_block_num": 8}),
        # PEFT makes one factor of them where it can't compile for CUDA
        ("BOFT", {"boft_block_size": 8, "boft_n_butterfly_factor": 2}),
        (
            "BOFT",
            {
                "boft_block_size": 0,
                "boft_block_num": 4,
                "boft_n_butterfly_factor": 2,
            },
        ),
    ],
)
def test_what_sites_may_differ_in(kind, options, tmp_path):
    make = getattr(peft, f"{kind}Config")
    config = make(target_modules=["q_proj", "down_proj"], **options)
    _both_ways("llama", config, tmp_path)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("Lora", ("r",)),
        ("LoHa", ("r",)),
        ("LoKr", ("r",)),
        ("OFT", ("oft_block_size",)),
    ],
)
def test_what_a_configuration_leaves_out_is_pefts_default(kind, kept, tmp_path):
    make = getattr(peft, f"{kind}Config")
    options = dict.fromkeys(kept, 4)
    config = make(target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    expected = _saved_by_peft("llama", config, tmp_path)
    file = tmp_path / "adapter_config.json"
    short = {key: json.loads(file.read_text())[key] for key in (*kept, *ALWAYS)}
    file.write_text(json.dumps(short))
    close(_loaded_by_peft("llama", tmp_path), expected)
    ours = tiny_model("llama")
    petune.load(ours, tmp_path)
    close(_logits(ours, "llama"), expected)


def test_coft_trains_within_its_bound():
    """As PEFT's does, which projects before each forward."""
    model = tiny_model("llama")
    tuning = petune.attach(model, "oft", block=8, where="q", bounded=True, eps=0.1)
    optimizer = torch.optim.SGD(tuning.parameters(), 100)
    for step in range(2):
        model(**tiny_batch("llama")).loss.backward()
        with tuning.step(step, 2):
            optimizer.step()
    most = 0.1 / 8**0.5
    for adapter in tuning.adapters.values():
        norms = adapter.free.norm(dim=1) * 2**0.5
        assert norms.max() <= most * (1 + 1e-6)
        assert norms.max() > most * (1 - 1e-6)


@pytest.mark.parametrize(
    ("family", "kind", "options"),
    [
        ("t5", "PromptTuning", {}),
        ("t5", "PromptTuning", {"num_transformer_submodules": 1}),
        ("t5", "PromptEncoder", {"encoder_hidden_size": 8}),
        ("gpt2", "PromptTuning", {}),
        (
            "gpt2",
            "PromptEncoder",
            {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"},
        ),
        ("llama", "PrefixTuning", {}),
        (
            "llama",
            "PrefixTuning",
            {"prefix_projection": True, "encoder_hidden_size": 8},
        ),
    ],
)
def test_prompts_and_prefixes(family, kind, options, tmp_path):
    task = TASKS.get(family, "CAUSAL_LM")
    make = getattr(peft, f"{kind}Config")
    config = make(num_virtual_tokens=3, task_type=task, **options)
    _both_ways(family, config, tmp_path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("VBLoRA", {"num_vectors": 20, "vector_length": 16, "r": 2}),
        ("RandLora", {"r": 8}),
        ("RandLora", {"r": 8, "save_projection": False}),
        ("Shira", {"r": 4}),
        ("TinyLora", {}),
        ("Pvera", {}),
        ("HRA", {"r": 4}),
        ("C3A", {"block_size": 32}),
    ],
)
def test_methods_of_peft_alone(kind, options, tmp_path):
    make = getattr(peft, f"{kind}Config")
    config = make(target_modules=["q_proj", "down_proj"], **options)
    tuning = _both_ways("llama", config, tmp_path)
    assert tuning.method == f"peft:{kind.lower()}"


@pytest.mark.parametrize(
    ("family", "target", "options"),
    [
        ("gpt2", "wpe", {}),
        ("bert", "position_embeddings", {"alpha_pattern": {"position_embeddings": 9}}),
        ("t5", "relative_attention_bias", {}),
        ("bert", "classifier", {"bias": "all"}),
        ("roberta", "classifier.out_proj", {"use_rslora": True}),
    ],
)
def test_lora_where_petune_has_no_hook_point_comes_as_a_copy(
    family, target, options, tmp_path
):
    layer = {"gpt2": "c_attn", "t5": "q"}.get(family, "query")
    config = peft.LoraConfig(r=3, target_modules=[layer, target], **options)
    _both_ways(family, config, tmp_path)


@pytest.mark.parametrize(
    ("where", "train"), [("q", ["classifier.out_proj"]), ("q other", []), ("other", [])]
)
def test_parts_of_a_head(where, train, tmp_path):
    """PEFT saves a classifier's head whole, whatever it adapts inside."""
    ours, again = tiny_model("roberta"), tiny_model("roberta")
    tuning = petune.attach(ours, "lora", where=where, train=train)
    shake(tuning.parameters())
    expected = _logits(ours, "roberta")
    tuning.save(tmp_path, format="peft")
    close(_loaded_by_peft("roberta", tmp_path), expected)
    petune.load(again, tmp_path)
    close(_logits(again, "roberta"), expected)


def test_tokens_of_a_model_that_classifies_them(tmp_path):
    config = transformers.LlamaConfig(**SIZE)
    torch.manual_seed(0)
    model = transformers.LlamaForTokenClassification(config).eval()
    fresh = copy.deepcopy(model)
    tuning = petune.attach(model, "trainable-tokens", ids=TOKENS, train=[])
    shake(tuning.parameters())
    tuning.save(tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    close(_logits(theirs, "llama"), _logits(model, "llama"))
    tuning.detach()
    tuning = petune.attach(model, "trainable-tokens", ids=TOKENS, train=["score"])
    with pytest.raises(petune.UnsupportedError, match="keeps no head beside"):
        tuning.save(tmp_path / "head", format="peft")


def test_a_head_trained_along_comes_back(tmp_path):
    ours, again = tiny_model("bert"), tiny_model("bert")
    tuning = petune.attach(ours, "lora", train=["classifier"])
    shake(tuning.parameters())
    tuning.save(tmp_path, format="peft")
    assert not any(".petune." in key for key in load_file(tmp_path / WEIGHTS))
    assert petune.load(again, tmp_path).heads == ("classifier",)
    close(_logits(again, "bert"), _logits(ours, "bert"))


@pytest.mark.parametrize(
    ("family", "make", "message"),
    [
        (
            "gpt2",
            lambda: peft.PrefixTuningConfig(
                num_virtual_tokens=3, task_type="CAUSAL_LM"
            ),
            "PREFIX_TUNING takes the first positions",
        ),
        (
            "t5",
            lambda: peft.PrefixTuningConfig(
                num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"
            ),
            "num_transformer_submodules=2: in an encoder-decoder",
        ),
        (
            "bert",
            lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
            "stand before the first token of an encoder",
        ),
        (
            "t5",
            lambda: _lora("t5", target_modules=["shared", "q"]),
            "adapts shared, which no forward of this model calls",
        ),
        (
            "llama",
            lambda: peft.OFTConfig(target_modules=["embed_tokens"], oft_block_size=8),
            "which neither 'oft' has nor this model; merge it in PEFT",
        ),
        (
            "llama",
            lambda: _lora("llama", init_lora_weights="olora", **EMBED),
            "init_lora_weights: at model.embed_tokens, whose weight",
        ),
        (
            "llama",
            lambda: _lora("llama", init_lora_weights="pissa_niter_4"),
            "init_lora_weights='pissa_niter_4': this start changes the base's weights",
        ),
        (
            "tied",
            lambda: _lora("tied", modules_to_save=["embed_tokens", "lm_head"]),
            "load it on a model with tie_word_embeddings=False",
        ),
        (
            "gpt-oss",
            lambda: _lora("gpt-oss", target_parameters=[f"{GATE_UP}_bias"]),
            "target_parameters lists .*gate_up_proj_bias, which is neither a weight",
        ),
        (
            "bart",
            lambda: peft.TrainableTokensConfig(token_indices=TOKENS),
            "at model.shared, which no forward of this model calls",
        ),
        (
            "llama",
            lambda: peft.VBLoRAConfig(
                num_vectors=20,
                vector_length=16,
                target_modules=["q_proj"],
                save_only_topk_weights=True,
            ),
            "save_only_topk_weights=True: such a folder lacks the logits",
        ),
        (
            "llama",
            lambda: peft.UniLoraConfig(target_modules=["q_proj"]),
            "UNILORA has no tensors of single layers",
        ),
    ],
)
def test_what_is_refused_says_why_and_leaves_the_model(family, make, message, tmp_path):
    theirs = peft.get_peft_model(_model(family), make())
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    model = _model(family)
    with pytest.raises(petune.UnsupportedError, match=message) as refused:
        petune.load(model, tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}")
    assert "\n" not in str(refused.value)
    assert petune.tunings(model) == {}


def test_what_peft_does_not_read_everywhere_is_said(tmp_path):
    tuning = petune.attach(tiny_model("llama"), "boft", where="q")
    with pytest.warns(PetuneWarning, match="only where it can compile for CUDA"):
        tuning.save(tmp_path / "boft", format="peft")
    config = transformers.LlamaConfig(**SIZE)
    model = transformers.LlamaForSequenceClassification(config).eval()
    tuning = petune.attach(model, "prompt-tuning", length=3)
    with pytest.warns(PetuneWarning, match="pad on the left there"):
        tuning.save(tmp_path / "prompt", format="peft")


@pytest.mark.filterwarnings("default::petune.errors.PetuneWarning")
def test_dropouts_of_peft_that_training_goes_on_without_are_said(tmp_path):
    config = peft.LoHaConfig(target_modules=["q_proj"], rank_dropout=0.2)
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    with pytest.warns(PetuneWarning, match=r"without PEFT's rank_dropout=0\.2"):
        petune.load(tiny_model("llama"), tmp_path)


def test_a_router_that_peft_adapts_trains_in_a_copy_which_is_said(tmp_path):
    config = _lora("mixtral", target_parameters=["mlp.gate.weight"])
    peft.get_peft_model(_model("mixtral"), config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    shake(tensors.values())
    save_file(tensors, tmp_path / WEIGHTS)
    model = _model("mixtral")
    with pytest.warns(
        PetuneWarning, match=r"0\.mlp\.gate\.weight and 1 more trains in a"
    ):
        petune.load(model, tmp_path)
    routers = [key for key in tensors if "mlp.gate" in key]
    for wrong in ({}, dict.fromkeys(routers, torch.ones(3, 5))):
        left = {key: t for key, t in tensors.items() if key not in routers}
        save_file(left | {k: t.clone() for k, t in wrong.items()}, tmp_path / WEIGHTS)
        model = _model("mixtral")
        with pytest.raises(petune.PetuneError, match="does not fit this model"):
            petune.load(model, tmp_path)
        assert petune.tunings(model) == {}


def test_experts_have_no_dropout_in_peft(tmp_path):
    tuning = petune.attach(_model("mixtral"), "lora", where="q down", dropout=0.1)
    with pytest.warns(PetuneWarning, match=r"without the dropout of 0\.1"):
        tuning.save(tmp_path / "peft", format="peft")


class _GainOfExperts(petune.Adapter):
    where, peft = "down", petune.PeftTwin("GAIN", {}, {"g": "gain"})

    def __init__(self, site):
        super().__init__()
        self.g = torch.nn.Parameter(torch.ones(site.out_features))

    def forward(self, inner, x, *, experts=()):
        return self.g * inner(x)


def test_a_method_without_an_option_for_experts(tmp_path):
    tuning = petune.attach(_model("mixtral"), _GainOfExperts)
    with pytest.raises(petune.UnsupportedError, match="no layer for stacked experts"):
        tuning.save(tmp_path / "out", format="peft")


@pytest.mark.parametrize(
    ("family", "where"),
    [
        ("llama", "embed q"),
        ("tied", "embed"),
        ("tied", "embed head"),
        ("gpt2", "embed"),
    ],
)
def test_lora_at_an_embedding_merges_and_leaves_a_tied_head(family, where, tmp_path):
    model = _model(family)
    tuning = petune.attach(model, "lora", where=where)
    shake(tuning.parameters())
    expected = _logits(model, family)
    tuning.merge()
    close(_logits(model, family), expected)
    model.save_pretrained(tmp_path)
    close(_logits(type(model).from_pretrained(tmp_path).eval(), family), expected)


@pytest.mark.parametrize(
    "init", ["default", "gaussian", "orthogonal", "pissa", "exact-pissa", "olora"]
)
def test_an_embedding_starts_at_the_base_and_trains(init):
    model = tiny_model("llama")
    before = _logits(model, "llama")
    tuning = petune.attach(model, "lora", where="embed", init=init)
    close(_logits(model, "llama"), before)
    model(**tiny_batch("llama")).loss.backward()
    assert any(p.grad.any() for p in tuning.parameters())


@pytest.mark.parametrize(
    ("family", "message"),
    [("gemma", "changes its rows"), ("t5", "is another embedding's too")],
)
def test_an_embedding_that_can_not_take_a_merge_is_left(family, message):
    model = _model(family)
    tuning = petune.attach(model, "lora", where="embed")
    shake(tuning.parameters())
    before = _logits(model, family)
    with pytest.raises(petune.UnmergeableError, match=message):
        tuning.merge()
    assert torch.equal(_logits(model, family), before)


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
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [5]),
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
