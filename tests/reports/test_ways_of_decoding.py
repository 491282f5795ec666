"""However `generate` decodes, an adapted model gives the tokens that it gives without a cache, or says why not."""

from functools import cache

import pytest
import torch
import transformers

import petune
from petune.testing import tiny_model
from petune_bench.coverage import tiny

METHODS = {
    "lora": {},
    "loreft": {},
    "ladder-side-tuning": {},
    "prompt-tuning": {"length": 4},
    "p-tuning": {"length": 4},
    "prefix-tuning": {"length": 4},
    "llama-adapter": {"length": 4},
}
WITH_VIRTUAL_TOKENS = ("prompt-tuning", "p-tuning")
IDS = torch.tensor([[11, 12, 13, 14, 15, 11, 12, 13]])
BASIC = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
BASIC |= {"pad_token_id": 0}
WAYS = {
    "static": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 1},
    "chunks": {"prefill_chunk_size": 3},
    "lengths": {"max_new_tokens": None, "max_length": 18, "min_length": 14},
}
SCORED = {
    "beams": {"num_beams": 3},
    "guidance": {"guidance_scale": 1.5},
    "watermark": {"watermarking_config": transformers.WatermarkingConfig()},
    "no repeats": {"no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.3},
}


@cache
def adapted(method):
    model = tiny_model("llama").double()
    torch.manual_seed(0)
    tuning = petune.attach(model, method, **METHODS[method])
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def generated(method, ids=IDS, **more):
    return adapted(method).generate(ids, **{**BASIC, **more})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_a_way_of_decoding_changes_no_token(method, way):
    plain = generated(method, use_cache=False)
    assert torch.equal(generated(method, **WAYS[way]), plain)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", SCORED)
def test_scores_that_are_processed_are_those_without_a_cache(method, way):
    plain = generated(method, use_cache=False, **SCORED[way])
    assert torch.equal(generated(method, **SCORED[way]), plain)


@pytest.mark.parametrize("method", METHODS)
def test_an_assistant_changes_no_token_or_is_refused(method):
    assistant = tiny_model("llama", layers=1).double()
    if method in WITH_VIRTUAL_TOKENS:
        with pytest.raises(petune.UnsupportedError, match="an assistant model"):
            generated(method, assistant_model=assistant)
        return
    plain = generated(method, use_cache=False)
    assert torch.equal(generated(method, assistant_model=assistant), plain)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "none"])
def test_a_static_cache_with_and_without_padding(method, side):
    ids = torch.tensor([[0, 0, 11, 12, 13, 14], [21, 22, 23, 24, 25, 26]])
    ids = ids if side == "left" else ids[1:]
    mask = (ids != 0).long()
    plain = generated(method, ids, attention_mask=mask, use_cache=False)
    static = generated(method, ids, attention_mask=mask, cache_implementation="static")
    assert torch.equal(static, plain)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_processors_of_the_prompt_s_tokens_see_the_user_s(family, beams):
    """With the rows of real tokens for a prompt, a model is its base with these tokens in front."""
    model, front = tiny_model(family), [5, 6, 7]
    base = tiny_model(family)
    petune.attach(model, "prompt-tuning", length=3, init=front)
    ids = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]])
    longer = torch.cat([torch.tensor([front, front]), ids], 1)
    options = {**BASIC, "num_beams": beams}
    for more in (
        {"encoder_repetition_penalty": 5.0},
        {"encoder_no_repeat_ngram_size": 2},
    ):
        ours = model.generate(ids, **options, **more)
        # a processor that is given counts no tokens of the base's own longer prompt
        wanted = base.generate(longer, **options, logits_processor=made(more, ids))
        if family == "llama":
            wanted = torch.cat([ids, wanted[:, longer.shape[1] :]], 1)
        assert torch.equal(ours, wanted)


def made(options, ids):
    (name, value), *_ = options.items()
    kinds = {
        "encoder_repetition_penalty": transformers.EncoderRepetitionPenaltyLogitsProcessor,
        "encoder_no_repeat_ngram_size": transformers.EncoderNoRepeatNGramLogitsProcessor,
    }
    return transformers.LogitsProcessorList([kinds[name](value, ids)])


def test_a_state_that_is_a_list_takes_no_note():
    """RWKV's, which `generate` gives back with the tokens."""
    heads = tiny.architectures()["rwkv"]
    model = tiny.build("rwkv", "causal-lm", heads["causal-lm"])
    petune.attach(model, "prompt-tuning", length=4)
    out = model.generate(IDS, **BASIC, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(IDS, **BASIC, use_cache=False))
