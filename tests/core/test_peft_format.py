"""PEFT's folders, both ways: the same logits to 1e-5, for every method that both have."""

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
NORMS = {"llama": ["input_layernorm", "norm"], "gpt2": ["ln_1", "ln_f"], "bert": ["output.LayerNorm"]}
NORMS |= {"t5": ["layer_norm", "final_layer_norm"]}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
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
    "dora": (at(lambda **more: peft.LoraConfig(r=4, use_dora=True, **more)), {}, TARGETS),
    "vera": (at(lambda **more: peft.VeraConfig(r=6, projection_prng_key=3, **more)), {"rank": 6, "seed": 3}, TARGETS),
    "loha": (at(lambda **more: peft.LoHaConfig(r=3, alpha=4, **more)), {"rank": 3}, LINEAR),
    "lokr": (at(lambda **more: peft.LoKrConfig(r=5, **more)), {"rank": 3, "factor": 7}, LINEAR),
    "oft": (at(lambda **more: peft.OFTConfig(oft_block_size=8, **more)), {"block": 8}, LINEAR),
    "boft": (
        at(lambda **more: peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, **more)),
        {"block": 4},
        LINEAR,
    ),
    "ia3": (
        lambda family: peft.IA3Config(
            target_modules=TARGETS[family], feedforward_modules=TARGETS[family][-1:], task_type=TASKS[family]
        ),
        {},
        TARGETS,
    ),
    "ln-tuning": (at(peft.LNTuningConfig, NORMS), {}, TARGETS),
    "trainable-tokens": (
        lambda family: peft.TrainableTokensConfig(token_indices=IDS, task_type=TASKS[family]),
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
    "prefix-tuning": (lambda family: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), {}, ["llama"]),
}
CELLS = [(method, family) for method, (_, _, families) in PAIRS.items() for family in families]
PROMPTS = ("prompt-tuning", "p-tuning", "prefix-tuning")


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@torch.no_grad()
def shake(parameters):
    torch.manual_seed(0)
    for p in parameters:
        p.add_(torch.randn_like(p) * 0.1)


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
        apply = staticmethod(lambda blocks: torch.stack([torch.block_diag(*factor) for factor in blocks]))

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
    assert ("classifier" in tuning.heads) == (family == "bert" and method != "trainable-tokens")
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
    arguments = PAIRS[method][1] if method != "p-tuning" else {"length": 4, "hidden": 8, "encoder": "lstm"}
    where = WHERE[family] if method in ("lora", "dora", "vera", "loha", "lokr", "oft", "boft") else None
    where = "q k v down" if (method, family) == ("ia3", "gpt2") else where
    heads = ["classifier"] if family == "bert" else None
    tuning = petune.attach(ours, method, where=where, train=heads, **arguments)
    shake(tuning.parameters())
    tuning.save(tmp_path, format="peft")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    close(of_peft(theirs, method, family), logits(ours, tiny_batch(family)))
