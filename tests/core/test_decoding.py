"""Every way of generating gives what the uncached one gives, whichever cache holds what was seen."""

import inspect

import pytest
import torch
import transformers
from shaken import shaken

import petune
from petune.testing import tiny_model

METHODS = ["lora", "loreft", "prompt-tuning", "p-tuning", "prefix-tuning"]
FAMILIES = ["llama", "gpt2", "t5", "mistral"]
NEW = 7
OPTIONS = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}
IDS = torch.tensor([[0, 0, 11, 12, 13, 14, 15], [21, 22, 23, 24, 25, 26, 27]])
MASK = (IDS != 0).long()


def built(family):
    if family != "mistral":
        return tiny_model(family)
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, sliding_window=8, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model


@pytest.fixture(params=[(f, m) for f in FAMILIES for m in METHODS], ids="-".join)
def tuned(request):
    family, method = request.param
    model = built(family)
    shaken(
        model, method, **({"length": 5} if "t" in method and "tuning" in method else {})
    )
    return model


def scores(model, **options):
    """The logits of each new token, (rows, new tokens, vocabulary)."""
    out = model.generate(
        IDS, attention_mask=MASK, **{**OPTIONS, **options},
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.stack(out.logits, 1), out


def close(got, want):
    torch.testing.assert_close(
        got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max())
    )


def test_cached_static_and_chunked(tuned):
    want, _ = scores(tuned, use_cache=False)
    close(scores(tuned)[0], want)
    close(scores(tuned, cache_implementation="static", disable_compile=True)[0], want)
    if not tuned.config.is_encoder_decoder:
        close(scores(tuned, prefill_chunk_size=3)[0], want)


def test_beams(tuned):
    options = {**OPTIONS, "num_beams": 3, "num_return_sequences": 3}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    want = tuned.generate(IDS, attention_mask=MASK, use_cache=False, **options)
    got = tuned.generate(IDS, attention_mask=MASK, **options)
    close(got.sequences_scores, want.sequences_scores)
    assert torch.equal(got.sequences, want.sequences)


def cache_name(model):
    parameters = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "past_key_values") if name in parameters)


@pytest.mark.parametrize("old_name", [False, True])
def test_by_hand(tuned, old_name):
    """The cache that one forward gives goes into the next, under either of its names."""
    want, _ = scores(tuned, use_cache=False)
    name = "past_key_values" if old_name else cache_name(tuned)
    mask, given = MASK, {"input_ids": IDS}
    if tuned.config.is_encoder_decoder:
        encoded = tuned.generate(
            IDS,
            attention_mask=MASK,
            return_dict_in_generate=True,
            **{**OPTIONS, "max_new_tokens": 1},
        )
        assert encoded.sequences.shape == (2, 2)
        given["decoder_input_ids"] = torch.zeros(2, 1, dtype=torch.long)
    cache, found = None, []
    for _ in range(NEW):
        if tuned.config.is_encoder_decoder:
            options = {"attention_mask": MASK}
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[
                :, -given["input_ids"].shape[1] :
            ]
            virtual = sum(
                int(link.adapter.length)
                for t in petune.tunings(tuned).values()
                for link in t.prompts
            )
            options = {
                "attention_mask": mask,
                "position_ids": positions + (virtual if cache is not None else 0),
            }
        if cache is not None:
            options[name] = cache
        with torch.no_grad():
            out = tuned(**given, **options, use_cache=True)
        cache = out.get(cache_name(tuned))
        found.append(out.logits[:, -1])
        new = found[-1].argmax(-1, keepdim=True)
        if tuned.config.is_encoder_decoder:
            given = {"input_ids": IDS, "decoder_input_ids": new}
        else:
            given, mask = {"input_ids": new}, torch.cat([mask, torch.ones_like(new)], 1)
    close(torch.stack(found, 1), want)


def test_a_cache_kept_from_turn_to_turn(tuned):
    if tuned.config.is_encoder_decoder:
        pytest.skip("an encoder-decoder begins anew with each input")
    _, first = scores(tuned)
    turn = torch.tensor([[41, 42, 43], [51, 52, 53]])
    whole = torch.cat([first.sequences, turn], 1)
    mask = torch.cat([MASK, MASK.new_ones(2, NEW + 3)], 1)
    options = {**OPTIONS, "return_dict_in_generate": True, "output_logits": True}
    want = tuned.generate(whole, attention_mask=mask, use_cache=False, **options)
    cache = {cache_name(tuned): first.get(cache_name(tuned))}
    got = tuned.generate(whole, attention_mask=mask, **cache, **options)
    assert got.sequences.shape == want.sequences.shape
    assert torch.equal(got.sequences[:, : whole.shape[1]], whole), (
        "the prompt comes back as it was"
    )
    (tuning,) = petune.tunings(tuned).values()
    if tuning.method == "loreft":  # what the first turn has read stays as it was edited
        turns = [(0, IDS.shape[1]), (IDS.shape[1] + NEW - 1, whole.shape[1])]
        edited = edited_by_turns(tuning, got.sequences, turns)
        want_logits = edited[:, whole.shape[1] - 1 : -1]
    else:
        want_logits = torch.stack(want.logits, 1)
    close(torch.stack(got.logits, 1), want_logits)


@torch.no_grad()
def edited_by_turns(tuning, ids, turns):
    """The logits of a base whose blocks edit explicit columns, by plain hooks: the first and the last tokens of each
    prompt, as far as its turn has read them.

    Args:
        turns: (first column that is read, end of the prompt) of each.
    """
    mask = torch.cat([MASK, MASK.new_ones(2, ids.shape[1] - MASK.shape[1])], 1)
    head, tail = torch.zeros(2, *ids.shape, dtype=torch.bool)
    for begin, end in turns:
        for row in range(len(ids)):
            prompt = mask[row, :end].nonzero().flatten().tolist()
            last = min(7, len(prompt) - len(prompt) // 2)
            first = min(7, len(prompt) - last)
            head[row, [c for c in prompt[:first] if c >= begin]] = True
            tail[row, [c for c in prompt[-last:] if c >= begin]] = True
    model = built(tuning.model.config.model_type)

    def editing(adapter):
        at_head, at_tail = adapter.edits
        return lambda block, given, h: h + at_head(h, head) + at_tail(h, tail)

    for name, adapter in tuning.adapters.items():
        model.get_submodule(name).register_forward_hook(editing(adapter))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, position_ids=positions).logits


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_row_is_as_alone_in_a_batch_padded_on_the_left(family):
    """Virtual tokens stand before the row's first token: behind the padding, where a sliding window sees them."""
    model = built(family)
    shaken(model, "prompt-tuning", length=5)
    options = {**OPTIONS, "return_dict_in_generate": True, "output_logits": True}
    ids = torch.tensor([[0] * 10 + [10, 11], list(range(20, 32))])
    mask = (ids != 0).long()
    batch = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[:1, 10:], attention_mask=mask[:1, 10:], **options)
    close(torch.stack(batch.logits, 1)[:1], torch.stack(alone.logits, 1))
    assert torch.equal(batch.sequences[:, :12], ids)


def test_a_cache_says_which_virtual_tokens_it_holds():
    model = tiny_model("llama")
    tuning = shaken(model, "prompt-tuning", length=5)
    name, ids = cache_name(model), torch.tensor([[11, 12, 13]])
    out = model(ids, use_cache=True)
    cache = out.get(name)
    for _ in range(6):
        out = model(
            out.logits[:, -1].argmax(-1, keepdim=True), **{name: cache}, use_cache=True
        )
    assert cache.get_seq_length() == 5 + 3 + 6
    with tuning.disabled():
        plain = model(ids, use_cache=True).get(name)
    with pytest.raises(petune.UnsupportedError, match="without the virtual tokens"):
        model(ids, **{name: plain})
    shaken(model, "prompt-tuning", "more", length=2)
    with pytest.raises(petune.UnsupportedError, match="another tuning"):
        model(ids, **{name: cache})


class Watch(transformers.StoppingCriteria, transformers.LogitsProcessor):
    """A criterion, a processor and a streamer that note the ids they see."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **_):
        self.seen.append(input_ids.clone())
        return scores if scores is not None and torch.is_tensor(scores) else False

    def put(self, value):
        self.seen.append(value.clone())

    def end(self):
        pass


def test_criteria_processors_and_streamers_see_the_users_ids():
    model = tiny_model("llama")
    shaken(model, "prompt-tuning", length=5)
    processor, streamer, seen = Watch(), Watch(), []

    class Criterion(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            seen.append(input_ids.clone())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    out = model.generate(
        IDS[1:],
        **OPTIONS,
        logits_processor=[processor],
        stopping_criteria=[Criterion()],
        streamer=streamer,
    )
    assert out.shape == (1, 7 + NEW)
    for step, ids in enumerate(processor.seen):
        assert torch.equal(ids, out[:, : 7 + step])
    for step, ids in enumerate(seen):
        assert torch.equal(ids, out[:, : 8 + step])
    assert torch.equal(streamer.seen[0], IDS[1:])
    shortest = model.generate(
        IDS[1:],
        do_sample=False,
        pad_token_id=0,
        eos_token_id=int(out[0, 7]),
        min_new_tokens=3,
        max_length=12,
    )
    assert 10 <= shortest.shape[1] <= 12
