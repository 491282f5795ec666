"""Encoder-decoders: the loss and the gradients of the labelled tokens alone are the model's own."""

import pytest
import torch
import transformers
from shaken import shaken

import petune
from petune.testing import tiny_batch, tiny_model
from petune.training.own_loss import own_loss

SMALL = {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48,
         "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "max_position_embeddings": 64}  # fmt: skip


def built(name):
    torch.manual_seed(0)
    if name == "t5":
        return tiny_model("t5")
    config = getattr(transformers, f"{name}Config")(**SMALL)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


def batch_of(model):
    ids = torch.randint(4, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids[:, :6].clone()
    labels[0, 3:] = labels[2, 5:] = -100
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", ["t5", "Bart", "Pegasus", "MBart"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("lora", {"where": "q v head"}), ("prefix-tuning", {}), ("full", {})],
)
def test_equal_to_the_models_own(name, method, options):
    model = built(name)
    assert own_loss(model) is not None
    tuning = shaken(model, method, **options)
    batch = batch_of(model)
    loss = model(**batch).loss
    gradients = torch.autograd.grad(loss, tuning.parameters(), allow_unused=True)
    with petune.lean(model):
        out = model(**batch)
        found = torch.autograd.grad(out.loss, tuning.parameters(), allow_unused=True)
    assert out.logits is None
    torch.testing.assert_close(out.loss, loss)
    for one, other in zip(found, gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_others_are_left_alone():
    for family in ("bert", "llama"):
        assert own_loss(tiny_model(family)) is None
    model = tiny_model("t5")
    forward = model.forward
    model.forward = lambda *args, decoder_input_ids=None, **kwargs: (
        forward(*args, **kwargs) | {"loss": torch.tensor(1.0)}
    )
    assert own_loss(model) is None


def test_a_label_that_is_read_gives_its_logits():
    """Without gradients, and without labels, nothing is left out."""
    model = tiny_model("t5")
    batch = tiny_batch("t5")
    with petune.lean(model):
        with torch.no_grad():
            assert model(**batch).logits is not None
        labels = batch.pop("labels")
        assert model(**batch, decoder_input_ids=labels.clamp(min=0)).logits is not None
