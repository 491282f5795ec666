"""PEFT's own methods as petune's: the same numbers, and everything that petune brings."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from shaken import close, shake

import petune
from petune.testing import check_method, run_checks, tiny_batch, tiny_model
from petune.testing.behaviours import logits
from petune_bench.coverage import checks, tiny

# the tiny models are too narrow for some defaults
OPTIONS = {
    "adalora": {"total_step": 100},
    "c3a": {"block_size": 16},
    "ia3": {"feedforward_modules": ["down_proj", "output.dense"]},
    "road": {"group_size": 16},
    "shira": {"r": 2},
    "vblora": {"vector_length": 16, "num_vectors": 8},
    "waveft": {"n_frequency": 100},
}
WHOLE = [
    "prompt_tuning",
    "multitask_prompt_tuning",
    "p_tuning",
    "prefix_tuning",
    "adaption_prompt",
    "cpt",
    "cartridge",
]
ELSEWHERE = [
    "ln_tuning",
    "trainable_tokens",
    "poly",
    "lily",
    "xlora",
    "shadow",
    "glora",
]
UNTRACED = [
    "frod",
    "shira",
    "waveft",
]  # PEFT's own code makes sparse matrices, or types, that dynamo does not know
EQUAL = ["hra", "miss", "peanut", "vblora", "randlora", "delora"]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def layered():
    names = {
        name.removeprefix("peft:")
        for name in petune.methods()
        if name.startswith("peft:")
    }
    return sorted(names - {*WHOLE, *ELSEWHERE})


def test_peft_is_not_imported_for_others():
    code = "import sys, petune; petune.methods(); petune.testing.tiny_model; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", EQUAL)
def test_the_same_numbers_as_in_peft(method):
    kind = peft.PeftType(method.upper())
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind](
        target_modules=TARGETS, **OPTIONS.get(method, {})
    )
    theirs, ours = (
        peft.get_peft_model(tiny_model("llama"), config).eval(),
        tiny_model("llama"),
    )
    before = logits(ours, tiny_batch("llama"))
    shake(p for p in theirs.parameters() if p.requires_grad)
    tuning = petune.attach(
        ours, f"peft:{method}", where=" ".join(TARGETS), **OPTIONS.get(method, {})
    )
    with torch.no_grad():
        for name, adapter in tuning.adapters.items():
            own = theirs.base_model.model.get_submodule(name).state_dict()
            adapter.layer.load_state_dict(
                {k: own[k] for k in adapter.layer.state_dict()}
            )
    want = logits(theirs, tiny_batch("llama"))
    assert (want - before).abs().max() > 1e-3
    close(logits(ours, tiny_batch("llama")), want)


def test_options_are_those_of_peft_with_its_defaults():
    from petune.core.method.arguments import arguments

    known = arguments(petune.methods()["peft:hra"])
    assert {"r", "apply_GS", "init_weights"} == set(known)
    assert known["r"].default == peft.HRAConfig().r
    with pytest.raises(petune.PetuneError, match="Did you mean 'apply_GS'"):
        petune.attach(tiny_model("llama"), "peft:hra", apply_gs=True)
    with pytest.raises(petune.PetuneError, match="valid integer"):
        petune.attach(tiny_model("llama"), "peft:hra", r="many")


@pytest.mark.parametrize(
    "method", ["prompt_tuning", "ln_tuning", "poly", "c3a", "lily", "xlora"]
)
def test_what_peft_can_not_do_is_refused_with_its_reason(method):
    model = tiny_model("llama")
    reason = {
        "prompt_tuning": "whole model",
        "ln_tuning": "nothing to train",
        "poly": "task_ids",
        "c3a": "block size",
    }
    reason["xlora"] = "more of the model"
    with pytest.raises(
        petune.UnsupportedError,
        match=f"peft:{method}.*{reason.get(method, 'mixes the rows')}",
    ):
        petune.attach(model, f"peft:{method}")
    assert petune.tunings(model) == {}
    with pytest.raises(
        petune.UnsupportedError, match=r"acts on linear layers, which .*#mlp is not"
    ):
        petune.attach(model, "peft:hra", where="mlp")


def test_the_base_stays_as_small_as_it_is():
    """PEFT's layers hold no weight of the base: what reads it has it made anew."""
    model = tiny_model("llama", "nf4")
    tuning = petune.attach(model, "peft:hira", r=2)
    sizes = {name: p.numel() for name, p in tuning.state()}
    assert not [name for name in sizes if "base_layer" in name]
    assert max(sizes.values()) == 2 * 128


@pytest.mark.parametrize(("family", "where"), [("gpt2", "q v down"), ("t5", None)])
def test_where_peft_itself_has_no_layer(family, where):
    """HRA in PEFT is for nn.Linear alone; here also for a part of GPT-2's fused projection."""
    model = tiny_model(family)
    before = logits(model, tiny_batch(family))
    tuning = petune.attach(model, "peft:hra", r=2, where=where)
    shake(tuning.parameters())
    on = logits(model, tiny_batch(family))
    assert (on - before).abs().max() > 1e-3
    tuning.merge()
    close(logits(model, tiny_batch(family)), on)


def test_a_part_whose_heads_interleave():
    """What delora changes is a product with the rows of the weight that are its part's."""
    model = tiny.build("gpt_neox", "causal-lm", "GPTNeoXForCausalLM")
    layer, batch = model.gpt_neox.layers[0].attention.query_key_value, tiny.batch(model)
    before = layer.weight.detach().clone()
    tuning = petune.attach(model, "peft:delora", r=2, where="k@0")
    shake(tuning.parameters())
    on = checks.output(model, batch)
    rows = tuning.links[0].site.part
    tuning.merge()
    close(checks.output(model, batch), on)
    assert (layer.weight != before).any(1).nonzero().flatten().tolist() == rows.tolist()


def test_shared_parameters_are_saved_once(tmp_path):
    model, fresh = tiny_model("llama"), tiny_model("llama")
    tuning = petune.attach(model, "peft:vblora", **OPTIONS["vblora"])
    shake(tuning.parameters())
    assert sum("vector_bank" in name for name, _ in tuning.state()) == 1
    tuning.save(tmp_path)
    petune.load(fresh, tmp_path)
    assert torch.equal(
        logits(fresh, tiny_batch("llama")), logits(model, tiny_batch("llama"))
    )


def test_hra_holds_the_kit():
    check_method("peft:hra", families=["llama"], precisions=["fp32"], r=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize("method", layered())
def test_all_others_hold_it(method, precision):
    """At a layer of each kind, to be done sooner."""
    cls, family = (
        petune.methods()[f"peft:{method}"],
        "llama" if precision == "fp32" else "bert",
    )
    narrow = type(cls.__name__, (cls,), {"where": "q down"})
    rows = list(
        run_checks(
            narrow, families=[family], precisions=[precision], **OPTIONS.get(method, {})
        )
    )
    failed = {row.behaviour: row.error for row in rows if row.error}
    assert set(failed) == ({"torch.compile"} if method in UNTRACED else set()), failed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_folders_of_peft(family, tmp_path):
    """Both ways, under PEFT's own names."""
    ours, again = tiny_model(family), tiny_model(family)
    tuning = petune.attach(
        ours, "peft:hra", r=4, train=["classifier"] if family == "bert" else None
    )
    shake(tuning.parameters())
    tuning.save(tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    close(logits(theirs, tiny_batch(family)), logits(ours, tiny_batch(family)))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = petune.load(again, tmp_path / "theirs")
    assert (loaded.method, loaded.arguments["r"]) == ("peft:hra", 4)
    close(logits(again, tiny_batch(family)), logits(ours, tiny_batch(family)))


def test_what_layers_share_has_no_folder_of_peft(tmp_path):
    tuning = petune.attach(tiny_model("llama"), "peft:frod", **OPTIONS.get("frod", {}))
    with pytest.raises(petune.UnsupportedError, match="shares tensors between layers"):
        tuning.save(tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_they_are_compared_like_any_other(suite, tmp_path):
    from petune.cli import main

    cells = [
        {"method": "peft:hra", "method_args": {"r": 2}, "precision": "nf4"},
        {"method": "peft:c3a"},  # its blocks do not divide the model's widths
        {"method": "peft:prompt_tuning"},
        {"method": "vera", "implementation": "peft", "method_args": {"rank": 8}},
        {"method": "houlsby", "implementation": "peft"},
    ]
    out = tmp_path / "out"
    assert main(["bench", suite(*cells), "--out", str(out)]) == 0
    rows = [
        json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()
    ]
    assert [row["status"] for row in rows] == [
        "ok",
        "unsupported",
        "unsupported",
        "ok",
        "unsupported",
    ]
    assert rows[0]["trainable_params"] > 0
