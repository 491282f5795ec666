"""AdaLoRA against PEFT's, step by step; and its schedule in our training."""

import peft
import pytest
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors.torch import load_file

import petune
from petune.testing import tiny_batch, tiny_model
from petune.testing.behaviours import logits

STEPS, RANK, TARGET = 20, 6, 2


def pair():
    """PEFT's and ours from the same weights: 2 steps of warmup, 5 after the last cut, a cut every third."""
    config = peft.AdaLoraConfig(
        init_r=RANK, target_r=TARGET, lora_alpha=8, tinit=2, tfinal=5, deltaT=3, total_step=STEPS,
        beta1=0.8, beta2=0.9, orth_reg_weight=0.3, target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",  # without it PEFT leaves the regularization out
    )  # fmt: skip
    theirs, ours = peft.get_peft_model(tiny_model("llama"), config), tiny_model("llama")
    tuning = petune.attach(
        ours, "adalora", where="q v down", rank=RANK, target=TARGET, alpha=8, warmup=0.1, cooldown=0.25, every=3,
        betas=(0.8, 0.9), orthogonality=0.3,
    )  # fmt: skip
    layers = {
        name: theirs.base_model.model.get_submodule(name) for name in tuning.adapters
    }
    with torch.no_grad():
        for name, adapter in tuning.adapters.items():
            layer = layers[name]
            layer.lora_E["default"].normal_(std=0.1)
            adapter.Q.copy_(layer.lora_A["default"])
            adapter.e.copy_(layer.lora_E["default"][:, 0])
            adapter.P.copy_(layer.lora_B["default"])
    return theirs, ours, tuning, layers


@pytest.mark.filterwarnings("ignore")
def test_equals_peft_step_by_step(tmp_path):
    torch.manual_seed(0)
    theirs, ours, tuning, layers = pair()
    batch = tiny_batch("llama")
    first = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0
    )
    second = torch.optim.AdamW(tuning.parameters(), lr=1e-3, weight_decay=0.0)
    left = []
    for step in range(STEPS):
        theirs(**batch).loss.backward()
        first.step()
        theirs.base_model.update_and_allocate(step)
        first.zero_grad()
        ours(**batch).loss.backward()
        with tuning.step(step, STEPS):
            second.step()
        second.zero_grad()
        for name, adapter in tuning.adapters.items():
            assert torch.equal(
                adapter.e == 0, layers[name].lora_E["default"][:, 0] == 0
            ), (
                step,
                name,
            )
            torch.testing.assert_close(
                adapter.e, layers[name].lora_E["default"][:, 0], rtol=1e-3, atol=1e-4
            )
            torch.testing.assert_close(
                adapter.Q, layers[name].lora_A["default"], rtol=1e-3, atol=1e-4
            )
            torch.testing.assert_close(
                adapter.P, layers[name].lora_B["default"], rtol=1e-3, atol=1e-4
            )
        left.append(sum(int((a.e != 0).sum()) for a in tuning.adapters.values()))
    sites = len(tuning.links)
    assert left[2] == sites * RANK, "cut during the warmup"
    assert left[15:] == [sites * TARGET] * 5, "the budget is not what was asked for"
    assert len({int(a.keep.sum()) for a in tuning.adapters.values()}) > 1, (
        "every site has the same rank"
    )
    with torch.no_grad():
        torch.testing.assert_close(
            logits(ours, batch), logits(theirs, batch), rtol=1e-3, atol=1e-3
        )
    theirs.save_pretrained(tmp_path)
    loaded = tiny_model("llama")
    adapters = petune.load(loaded, tmp_path).adapters
    rows = {
        len(tensor)
        for key, tensor in load_file(tmp_path / WEIGHTS).items()
        if key.endswith("lora_A")
    }
    assert max(rows) > min(rows), "PEFT has left no ranks out"
    assert {a.Q.shape[0] for a in adapters.values()} == {RANK}
    assert sum(int((a.e != 0).sum()) for a in adapters.values()) == sites * TARGET
    with torch.no_grad():
        torch.testing.assert_close(
            logits(loaded, batch), logits(theirs, batch), rtol=1e-5, atol=1e-5
        )


def test_the_schedule_goes_on_after_loading(tmp_path):
    """What a checkpoint holds beside the saved tuning is where the schedule stands."""
    torch.manual_seed(0)
    _, model, tuning, _ = pair()
    again = tiny_model("llama")

    def train(model, tuning, steps):
        optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
        for step in steps:
            model(**tiny_batch("llama")).loss.backward()
            with tuning.step(step, STEPS):
                optimizer.step()
            optimizer.zero_grad()

    train(model, tuning, range(8))
    tuning.save(tmp_path)
    other = petune.load(again, tmp_path)
    assert not any("mean" in key for key, _ in tuning.state())
    for key, tensor in tuning.progress().items():
        other.progress()[key].copy_(tensor)
    train(model, tuning, range(8, STEPS))
    train(again, other, range(8, STEPS))
    for (key, one), (_, two) in zip(tuning.state(), other.state(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=key)


def test_no_steps_to_cut_in():
    with pytest.raises(petune.PetuneError, match="leave no steps"):
        petune.attach(tiny_model("llama"), "adalora", warmup=0.5, cooldown=0.5)
