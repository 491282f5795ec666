"""Blocks without padding: the loss and the gradients of the padded batch."""

import pytest
import torch
import transformers
from shaken import shaken

import petune
from petune.training.unpadded import can_be_unpadded

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "pad_token_id": 0, "max_position_embeddings": 64}  # fmt: skip


def built(name, head="SequenceClassification"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES)
    return getattr(transformers, f"{name}For{head}")(config).eval()


def batch_of(lengths=(10, 4, 2)):
    ids = torch.randint(4, 90, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(10) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 1])}  # fmt: skip


def in_blocks(model):
    """The number of tokens that a block computes, as each is called."""
    seen = []
    layer = model.base_model.encoder.layer[0]
    layer.attention.register_forward_hook(
        lambda _, given, out: seen.append(out[0].shape[:2].numel())
    )
    return seen


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra"])
@pytest.mark.parametrize("method", ["lora", "houlsby", "ia3", "ln-tuning"])
def test_equal_to_the_padded_batch(name, method):
    model = built(name)
    tuning = shaken(model, method)
    batch, seen = batch_of(), in_blocks(model)
    loss = model(**batch).loss
    gradients = torch.autograd.grad(loss, tuning.parameters(), allow_unused=True)
    with petune.lean(model):
        seen.clear()
        ours = model(**batch).loss
        found = torch.autograd.grad(ours, tuning.parameters(), allow_unused=True)
    assert seen == [16]
    torch.testing.assert_close(ours, loss)
    for one, other in zip(found, gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_little_padding_there_is_stays():
    model = built("Bert")
    petune.attach(model, "lora")
    seen = in_blocks(model)
    with petune.lean(model):
        seen.clear()
        model(**batch_of((10, 10, 9)))
        with torch.no_grad():
            model(**batch_of())
    assert seen == [30, 30]


@pytest.mark.parametrize("method", ["prefix-tuning", "prompt-tuning", "loreft"])
def test_methods_that_act_by_position_keep_their_rows(method):
    model = built("Bert")
    petune.attach(model, method)
    assert not can_be_unpadded(model)


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_both_stacks_of_an_encoder_decoder(name):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "vocab_size": 96, "decoder_start_token_id": 0}
    if name == "T5":
        config = transformers.T5Config(
            **sizes, d_kv=8, d_ff=48, num_layers=2, num_heads=4
        )
        model = transformers.T5ForConditionalGeneration(config).eval()
    else:
        layers = {f"{stack}_{what}": n for stack in ("encoder", "decoder")
                  for what, n in (("layers", 2), ("ffn_dim", 48), ("attention_heads", 4))}  # fmt: skip
        config = transformers.BartConfig(**sizes, **layers)
        model = transformers.BartForConditionalGeneration(config).eval()
    tuning = shaken(model, "lora")
    labels = torch.randint(4, 90, (3, 7))
    labels[1, 2:] = labels[2, 4:] = -100
    labels[2, 1] = -100  # a gap is no padding
    batch = batch_of() | {"labels": labels}
    loss = model(**batch).loss
    gradients = torch.autograd.grad(loss, tuning.parameters(), allow_unused=True)
    widths = {}

    def note(module, given, out):
        widths[module] = out.shape[:-1].numel()

    for name, module in model.named_modules():
        if name.endswith(("wo", "fc2")):
            module.register_forward_hook(note)
    with petune.lean(model):
        widths.clear()
        ours = model(**batch).loss
        found = torch.autograd.grad(ours, tuning.parameters(), allow_unused=True)
    assert set(widths.values()) == {16, 13}
    torch.testing.assert_close(ours, loss)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_who_can_not():
    config = transformers.DebertaV2Config(**SIZES, relative_attention=True)
    assert not can_be_unpadded(transformers.DebertaV2ForSequenceClassification(config))
