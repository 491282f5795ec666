"""A row gives alone what it gives in a padded batch: under windows, local attention and recurrent states too."""

import inspect
from functools import cache

import pytest
import torch
import transformers

import petune
from petune_bench.coverage import tiny

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
LOCAL = ["sliding_attention", "full_attention"]
RECURRENT = ["mamba", "falcon_mamba", "recurrent_gemma", "jamba", "falcon_h1", "lfm2"]
MODELS = ["mistral", "gemma3", *RECURRENT]
METHODS = {
    "prompt-tuning": {"length": 5},
    "p-tuning": {"length": 5},
    "prefix-tuning": {"length": 5},
    "loreft": {},
}
WITHOUT_ATTENTION = ("mamba", "falcon_mamba")
LONG = torch.arange(20, 42)


def windowed(kind):
    if kind == "mistral":
        config = transformers.MistralConfig(**SIZES, sliding_window=8)
        model = transformers.MistralForCausalLM(config)
    else:
        more = {"head_dim": 16, "sliding_window": 8, "layer_types": LOCAL}
        config = transformers.Gemma3TextConfig(**SIZES, **more)
        model = transformers.Gemma3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # as large as those of trained models
    return model.eval()


@cache
def built(kind):
    torch.manual_seed(0)
    if kind in ("mistral", "gemma3"):
        return windowed(kind).double()
    heads = tiny.architectures()[kind]
    model = tiny.build(kind, "causal-lm", heads["causal-lm"]).double()
    model.set_experts_implementation("eager")  # others don't take float64
    return model


@torch.no_grad()
def logits(model, ids, mask):
    known = inspect.signature(type(model).forward).parameters
    places = (mask.cumsum(1) - 1).clamp(min=0)
    more = {"position_ids": places} if "position_ids" in known else {}
    return model(input_ids=ids, attention_mask=mask, **more).logits


def generated(model, ids, mask):
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, 1)


def check_rows(model, row, side):
    """The short row, beside a long one and alone."""
    pads = torch.zeros(len(LONG) - len(row), dtype=torch.long)
    padded = torch.cat([pads, row] if side == "left" else [row, pads])
    ids, alone = torch.stack([padded, LONG]), row[None]
    mask, every = (ids != 0).long(), torch.ones_like(alone)
    there = slice(len(pads), None) if side == "left" else slice(None, len(row))
    both = logits(model, ids, mask)[0, there]
    torch.testing.assert_close(both, logits(model, alone, every)[0])
    if side == "left":
        both = generated(model, ids, mask)[0]
        torch.testing.assert_close(both, generated(model, alone, every)[0])


@cache
def base_is_as_alone(kind):
    """Whether the model has the property that its tunings are to keep."""
    try:
        check_rows(built(kind), LONG[:5], "left")
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_a_padded_row_is_as_alone(kind, method):
    model = built(kind)
    if method == "prefix-tuning" and kind in WITHOUT_ATTENTION:
        with pytest.raises(petune.UnsupportedError, match="no softmax attention"):
            petune.attach(model, method)
        return
    if kind == "recurrent_gemma" and not base_is_as_alone(kind):
        pytest.skip("transformers 5.18 itself gives its padded rows other logits")
    torch.manual_seed(0)
    tuning = petune.attach(model, method, **METHODS[method])
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    try:
        for length in (2, 14):  # far shorter than the window, and longer
            for side in ("left", "right"):
                check_rows(model, torch.arange(44, 44 + length), side)
    finally:
        tuning.detach()
