"""transformers' own Trainer takes an adapted model as any other, a quantized one included."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import petune
from petune.testing import tiny_batch, tiny_model


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize(
    "method", ["lora", "prefix-tuning", "prompt-tuning", "last-layers"]
)
def test_it_trains_saves_and_resumes(method, precision, tmp_path):
    batch = tiny_batch("llama", rows=8)
    rows = [{k: v[i] for k, v in batch.items()} for i in range(8)]

    def trainer(steps):
        torch.manual_seed(0)
        model = tiny_model("llama", precision)
        tuning = petune.attach(model, method)
        options = {
            "learning_rate": 1e-2,
            "save_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
        }
        arguments = TrainingArguments(
            tmp_path,
            max_steps=steps,
            report_to=[],
            disable_tqdm=True,
            lr_scheduler_type="constant",
            **options,
        )
        return Trainer(model, arguments, train_dataset=rows), tuning

    whole, tuning = trainer(4)
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    again, resumed = trainer(4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(resumed.parameters(), tuning.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
