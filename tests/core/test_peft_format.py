"""PEFT's folders, both ways: the same logits to 1e-5, for every method that both have."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from shaken import close, shake

import petune
from petune.testing import tiny_batch, tiny_model
from petune.testing.behaviours import logits

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "value", "output.dense"],
    "t5": ["q", "v", "wo"],
}
NORMS = {
    "llama": ["input_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_f"],
    "bert": ["LayerNorm"],
}
NORMS |= {"t5": ["layer_norm", "final_layer_norm"]}
TASKS = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "bert": "SEQ_CLS",
    "t5": "SEQ_2_SEQ_LM",
}
WHERE = {"llama": "q v down", "gpt2": "q k v down", "bert": "q v o up", "t5": "k o"}
LINEAR = ["llama", "bert", "t5"]  # PEFT has these methods on nn.Linear alone
IDS = [81, 10, 59, 20]


def at(make, where=TARGETS):
    return lambda family: make(target_modules=where[family], task_type=TASKS[family])


# method: PEFT's configuration, our arguments, the families that PEFT's method works on
PAIRS = {
    "lora": (
        at(lambda **more: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, **more)),
        {"rank": 4, "rslora": True},
        TARGETS,
    ),
    "dora": (
        at(lambda **more: peft.LoraConfig(r=4, use_dora=True, **more)),
        {},
        TARGETS,
    ),
    "adalora": (
        at(
            lambda **more: peft.AdaLoraConfig(
                init_r=5, target_r=3, lora_alpha=6, total_step=9, deltaT=2, **more
            )
        ),
        {"rank": 5, "alpha": 6.0, "betas": (0.8, 0.9)},
        TARGETS,
    ),
    "vera": (
        at(lambda **more: peft.VeraConfig(r=6, projection_prng_key=3, **more)),
        {"rank": 6, "seed": 3},
        TARGETS,
    ),
    "loha": (
        at(lambda **more: peft.LoHaConfig(r=3, alpha=4, **more)),
        {"rank": 3},
        LINEAR,
    ),
    "lokr": (
        at(lambda **more: peft.LoKrConfig(r=5, **more)),
        {"rank": 3, "factor": 7},
        LINEAR,
    ),
    "oft": (
        at(lambda **more: peft.OFTConfig(oft_block_size=8, **more)),
        {"block": 8},
        LINEAR,
    ),
    "boft": (
        at(
            lambda **more: peft.BOFTConfig(
                boft_block_size=8, boft_n_butterfly_factor=2, **more
            )
        ),
        {"block": 4},
        LINEAR,
    ),
    "ia3": (
        lambda family: peft.IA3Config(
            target_modules=TARGETS[family],
            feedforward_modules=TARGETS[family][-1:],
            task_type=TASKS[family],
        ),
        {},
        TARGETS,
    ),
    "ln-tuning": (at(peft.LNTuningConfig, NORMS), {}, TARGETS),
    "trainable-tokens": (
        lambda family: peft.TrainableTokensConfig(
            token_indices=IDS, task_type=TASKS[family]
        ),
        {"ids": IDS},
        TARGETS,
    ),
    "prompt-tuning": (
        lambda family: peft.PromptTuningConfig(
            num_virtual_tokens=3, num_transformer_submodules=1, task_type=TASKS[family]
        ),
        {"length": 3},
        ["llama", "gpt2", "t5"],
    ),
    "prefix-tuning": (
        lambda family: peft.PrefixTuningConfig(
            num_virtual_tokens=3, task_type="CAUSAL_LM"
        ),
        {},
        ["llama"],
    ),
}
CELLS = [
    (method, family)
    for method, (_, _, families) in PAIRS.items()
    for family in families
]
PROMPTS = ("prompt-tuning", "p-tuning", "prefix-tuning")


@torch.no_grad()
def of_peft(model, method, family):
    """The logits of PEFT's model at the tokens that are not padding: it leaves those of a prompt in."""
    batch = tiny_batch(family)
    if method not in PROMPTS or family == "t5":
        return logits(model, batch)
    out = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return out[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]


@pytest.fixture(autouse=True)
def _butterflies(monkeypatch):
    """What PEFT compiles for CUDA, in plain torch: without it BOFT is cut to one factor."""
    from peft.tuners.boft import layer

    class BlockDiagonal:
        apply = staticmethod(
            lambda blocks: torch.stack([torch.block_diag(*factor) for factor in blocks])
        )

    monkeypatch.setattr(layer, "_FBD_CUDA", True)
    monkeypatch.setattr(layer, "FastBlockDiag", BlockDiagonal)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "family"), CELLS)
def test_what_peft_wrote_loads_here(method, family, tmp_path):
    theirs = peft.get_peft_model(tiny_model(family), PAIRS[method][0](family)).eval()
    shake(p for n, p in theirs.named_parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model(family)
    before = logits(ours, tiny_batch(family))
    tuning = petune.load(ours, tmp_path)
    assert tuning.method == method
    assert ("classifier" in tuning.heads) == (
        family == "bert" and method != "trainable-tokens"
    )
    got = logits(ours, tiny_batch(family))
    assert (got - before).abs().max() > 1e-3
    close(got, of_peft(theirs, method, family))
    tuning.save(tmp_path / "again")
    fresh = tiny_model(family)
    petune.load(fresh, tmp_path / "again")
    assert torch.equal(logits(fresh, tiny_batch(family)), got)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "family"), [*CELLS, ("p-tuning", "llama")])
def test_what_petune_saved_loads_in_peft(method, family, tmp_path):
    ours = tiny_model(family)
    arguments = (
        PAIRS[method][1]
        if method != "p-tuning"
        else {"length": 4, "hidden": 8, "encoder": "lstm"}
    )
    where = (
        WHERE[family]
        if method in ("lora", "dora", "adalora", "vera", "loha", "lokr", "oft", "boft")
        else None
    )
    where = "q k v down" if (method, family) == ("ia3", "gpt2") else where
    heads = ["classifier"] if family == "bert" else None
    tuning = petune.attach(ours, method, where=where, train=heads, **arguments)
    shake(tuning.parameters())
    tuning.save(tmp_path, format="peft")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    trainable = (
        method == "adalora"
    )  # with labels PEFT's asks for the adapter that trains, and fails where none does
    theirs = peft.PeftModel.from_pretrained(
        tiny_model(family), tmp_path, is_trainable=trainable
    ).eval()
    close(of_peft(theirs, method, family), logits(ours, tiny_batch(family)))


def test_p_tuning_comes_back_as_the_prompt_that_it_made(tmp_path):
    """Neither PEFT's folder of P-tuning nor ours has the encoder."""
    ours, fresh = tiny_model("gpt2"), tiny_model("gpt2")
    petune.attach(ours, "p-tuning", length=4).save(tmp_path, format="peft")
    assert petune.load(fresh, tmp_path).method == "prompt-tuning"
    close(logits(fresh, tiny_batch("gpt2")), logits(ours, tiny_batch("gpt2")))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arguments", [
    {"rank_pattern": {"down": 2, "*.1.*.q_proj": 7}, "alpha_pattern": {"q": 3.0}, "rslora": True},
    {"init": "pissa", "rank": 4},
    {"init": "olora", "rank_pattern": {"v": 3}},
])  # fmt: skip
def test_ranks_alphas_and_starts_of_lora(arguments, tmp_path):
    ours = tiny_model("llama")
    tuning = petune.attach(ours, "lora", where="q v down", **arguments)
    shake(tuning.parameters())
    tuning.save(tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    close(logits(theirs, tiny_batch("llama")), logits(ours, tiny_batch("llama")))
    fresh = tiny_model("llama")
    petune.load(fresh, tmp_path)
    close(logits(fresh, tiny_batch("llama")), logits(ours, tiny_batch("llama")))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [
    {"layers_to_transform": [1, 2], "rank_pattern": {r"layers\.1.*": 2, "v_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    {"target_modules": r".*\.[01]\..*(q_proj|lm_head)|lm_head", "exclude_modules": [r"layers.0.self_attn.q_proj"]},
    {"modules_to_save": ["lm_head"], "init_lora_weights": "gaussian"},
    {"modules_to_save": ["embed_tokens", "norm"]},
])  # fmt: skip
def test_what_else_a_folder_of_lora_may_say(more, tmp_path):
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": TARGETS["llama"], "task_type": "CAUSAL_LM", **more}
    )
    theirs = peft.get_peft_model(tiny_model("llama"), config).eval()
    shake(p for n, p in theirs.named_parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model("llama")
    petune.load(ours, tmp_path)
    close(logits(ours, tiny_batch("llama")), logits(theirs, tiny_batch("llama")))


@pytest.mark.filterwarnings("ignore")
def test_modules_by_an_expression(tmp_path):
    config = peft.IA3Config(
        target_modules=r".*(q|down)_proj", feedforward_modules=r".*down_proj"
    )
    theirs, ours = (
        peft.get_peft_model(tiny_model("llama"), config).eval(),
        tiny_model("llama"),
    )
    shake(p for n, p in theirs.named_parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    assert petune.load(ours, tmp_path).arguments == {"before": "down"}
    close(logits(ours, tiny_batch("llama")), logits(theirs, tiny_batch("llama")))


def test_targets_are_short_names_where_they_can_be(tmp_path):
    """vLLM and llama.cpp expect the modules' last names."""
    tuning = petune.attach(tiny_model("llama"), "lora", where="q v")
    tuning.save(tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("family", "method", "where", "arguments", "message"),
    [
        ("gpt2", "houlsby", None, {}, "PEFT's format has no 'houlsby'"),
        ("gpt2", "llama-adapter", None, {}, "PEFT's format has no 'llama-adapter'"),
        ("gpt2", "lora", "q v", {}, "parts of a fused projection"),
        ("gpt2", "prefix-tuning", None, {}, "moves the tokens' positions"),
        ("t5", "prefix-tuning", None, {}, "self-attention of every layer of a decoder"),
        (
            "llama",
            "prefix-tuning",
            "attention@1:",
            {},
            "self-attention of every layer of a decoder",
        ),
        ("bert", "prompt-tuning", None, {}, "before the first token of an encoder"),
        (
            "llama",
            "boft",
            None,
            {"block": 4, "factors": 3},
            "factors=3 is another method",
        ),
        (
            "llama",
            "boft",
            None,
            {"block": 8, "block_pattern": {"q": 4}},
            "q_proj has block=4, not 8, and PEFT has one for all",
        ),
        (
            "llama",
            "oft",
            None,
            {"neumann": True, "terms": 3},
            "terms=3 is another method",
        ),
    ],
)
def test_what_peft_can_not_hold_is_refused_before_anything_is_written(
    family, method, where, arguments, message, tmp_path
):
    tuning = petune.attach(tiny_model(family), method, where=where, **arguments)
    with pytest.raises(petune.UnsupportedError, match=message):
        tuning.save(tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()
    with pytest.raises(petune.PetuneError, match="Did you mean 'peft'"):
        tuning.save(tmp_path / "out", format="pefft")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("lora", {"lora_bias": True}, r"it has no '.*_proj\.b'"),
        (
            "lora",
            {"alora_invocation_tokens": [5]},
            "no method here is PEFT's LORA with alora_invocation_tokens=",
        ),
        ("lora", {"peft_type": "NOVEL"}, "no method here is PEFT's NOVEL"),
        (
            "lora",
            {"peft_type": "HRA"},
            "lora_A.weight', which this model has no place for|it has no '.*hra_u",
        ),
        ("lora", {"init_lora_weights": "corda"}, "with init_lora_weights='corda'"),
        ("lora", {"r": 5}, "does not fit this model"),
        ("lokr", {"decompose_factor": 4}, "does not fit this model"),
        ("oft", {"block_share": True}, "does not fit this model"),
        ("oft", {"num_cayley_neumann_terms": 3}, "PEFT makes of 3 terms what 4 are"),
        (
            "vera",
            {"projection_prng_key": 4},
            "its A is not the one that its seed draws",
        ),
        ("prefix-tuning", {"num_virtual_tokens": 4}, "does not fit this model"),
        (
            "prompt-tuning",
            {"num_transformer_submodules": 2},
            "with num_transformer_submodules=2",
        ),
    ],
)
def test_a_folder_of_another_method_is_refused(method, change, message, tmp_path):
    peft.get_peft_model(tiny_model("llama"), PAIRS[method][0]("llama")).save_pretrained(
        tmp_path
    )
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = tiny_model("llama")
    with pytest.raises(petune.PetuneError, match=message):
        petune.load(model, tmp_path)
    assert petune.tunings(model) == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "shape"),
    [("prefix-tuning", (3, 10)), ("boft", (1, 2, 3)), ("ia3", (5,))],
)
def test_a_tensor_of_another_shape_is_no_crash(method, shape, tmp_path):
    peft.get_peft_model(tiny_model("llama"), PAIRS[method][0]("llama")).save_pretrained(
        tmp_path
    )
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {key: torch.zeros(shape) for key in tensors},
        tmp_path / "adapter_model.safetensors",
    )
    model = tiny_model("llama")
    with pytest.raises(petune.PetuneError, match="does not fit this model"):
        petune.load(model, tmp_path)
    assert petune.tunings(model) == {}


def test_a_gain_that_is_not_the_weight_is_refused(tmp_path):
    """Gemma's norms multiply by one more than their weight."""
    from transformers import GemmaConfig, GemmaForCausalLM

    size = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = GemmaForCausalLM(
        GemmaConfig(vocab_size=32, num_key_value_heads=1, head_dim=32, **size)
    )
    with pytest.raises(petune.UnsupportedError, match="its gain is not its weight"):
        petune.attach(model, "ln-tuning").save(tmp_path, format="peft")
