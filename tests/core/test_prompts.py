"""Virtual tokens give what the same rows give as input embeddings, whatever form the call takes."""

import pytest
import torch

import petune
from petune.testing import tiny_batch, tiny_model
from petune.testing.behaviours import GENERATION


def prompted(family, length=4, name="default"):
    model = tiny_model(family)
    tuning = petune.attach(model, "prompt-tuning", length=length, name=name)
    with torch.no_grad():
        tuning.links[0].adapter.rows.add_(torch.randn(length, 64) * 0.3)
    return model, tuning


def reference(model, tuning, batch, at):
    """The base on input embeddings with the rows put in by hand."""
    with tuning.disabled():
        x = model.get_input_embeddings()(batch["input_ids"])
        rows = tuning.links[0].adapter().expand(len(x), -1, -1)
        mask = batch["attention_mask"]
        full = torch.cat([x[:, :at], rows, x[:, at:]], 1)
        seen = torch.cat([mask[:, :at], mask.new_ones(rows.shape[:2]), mask[:, at:]], 1)
        return model(inputs_embeds=full, attention_mask=seen).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen"])
def test_decoder(family):
    model, tuning = prompted(family)
    batch = tiny_batch(family)
    got, want = model(**batch), reference(model, tuning, batch, 0)
    torch.testing.assert_close(got.logits, want[:, 4:])
    shifted = torch.nn.functional.cross_entropy(
        want[:, 3:-1].flatten(0, 1), batch["labels"].flatten()
    )
    torch.testing.assert_close(got.loss, shifted)


def test_an_encoder_reads_its_class_from_its_first_token():
    model, tuning = prompted("bert")
    batch = tiny_batch("bert")
    torch.testing.assert_close(
        model(**batch).logits, reference(model, tuning, batch, 1)
    )
    hidden = model.bert(**{k: v for k, v in batch.items() if k != "labels"})
    assert hidden.last_hidden_state.shape[1] == 10, (
        "the model that it was attached to puts prompts in, its parts do not"
    )


def test_results_at_the_tokens_only():
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=128,
    )
    batch = {k: v for k, v in tiny_batch("bert").items() if k != "labels"}
    tagger = transformers.BertForTokenClassification(config).eval()
    petune.attach(tagger, "prompt-tuning", length=4)
    labels = torch.zeros_like(batch["input_ids"])
    assert tagger(**batch, labels=labels).logits.shape == (2, 10, 2)
    reader = transformers.BertForQuestionAnswering(config).eval()
    petune.attach(reader, "prompt-tuning", length=4)
    out = reader(
        **batch,
        start_positions=torch.tensor([0, 3]),
        end_positions=torch.tensor([1, 5]),
    )
    assert out.start_logits.shape == out.end_logits.shape == (2, 10)
    assert out.loss.isfinite()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_other_forms_of_the_same_call(family):
    """Input embeddings, explicit positions, a 4-D mask and no mask at all."""
    model, _ = prompted(family)
    batch = tiny_batch(family, padding=0)
    ids = batch["input_ids"]
    want = model(input_ids=ids).logits
    torch.testing.assert_close(model(ids).logits, want)
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, want
    )
    torch.testing.assert_close(
        model(inputs_embeds=model.get_input_embeddings()(ids)).logits, want
    )
    torch.testing.assert_close(
        model(input_ids=ids, position_ids=torch.arange(10)[None].expand(2, -1)).logits,
        want,
    )
    causal = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
    torch.testing.assert_close(model(input_ids=ids, attention_mask=causal).logits, want)
    additive = torch.zeros(2, 1, 10, 10).masked_fill(
        ~causal, torch.finfo(torch.float32).min
    )
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=additive).logits, want
    )


def test_decoding_by_hand_goes_on_from_the_cache():
    model, _ = prompted("llama")
    ids = tiny_batch("llama", padding=0)["input_ids"]
    want = model(input_ids=ids).logits
    first = model(input_ids=ids[:, :6], use_cache=True)
    rest = model(input_ids=ids[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, want[:, 6:], rtol=1e-4, atol=1e-4)
    first = model(input_ids=ids[:, :6], use_cache=True)
    masked = model(
        input_ids=ids[:, 6:],
        past_key_values=first.past_key_values,
        attention_mask=torch.ones_like(ids),
    )
    torch.testing.assert_close(masked.logits, want[:, 6:], rtol=1e-4, atol=1e-4)


def test_two_prompts_stand_one_after_the_other():
    model, one = prompted("llama", 3, "one")
    two = petune.attach(model, "prompt-tuning", length=2, name="two")
    rows = torch.cat([one.links[0].adapter(), two.links[0].adapter()])
    single = tiny_model("llama")
    both = petune.attach(single, "prompt-tuning", length=5)
    with torch.no_grad():
        both.links[0].adapter.rows.copy_(rows)
    batch = tiny_batch("llama")
    assert torch.equal(model(**batch).logits, single(**batch).logits)


def test_a_row_gets_all_the_prompts_of_its_tuning():
    model, _ = prompted("llama", 3, "before")
    petune.attach(
        model,
        ["prompt-tuning", "p-tuning"],
        name="two",
        **{"prompt-tuning": {"length": 3}},
    )
    batch = {k: v for k, v in tiny_batch("llama", padding=0).items() if k != "labels"}
    with petune.route(model, ["two", None]):
        both = model(**batch).logits
    petune.tunings(model)["before"].disable()
    torch.testing.assert_close(
        both[:1], model(**batch).logits[:1], rtol=1e-4, atol=1e-5
    )


def test_processors_and_limits_see_the_users_tokens_only():
    model, _ = prompted("llama")
    ids = tiny_batch("llama", padding=0)["input_ids"]
    seen = []

    def spy(input_ids, scores):
        seen.append(input_ids.shape[1])
        assert int(input_ids.max()) < 128
        return scores

    from transformers import LogitsProcessorList

    out = model.generate(
        ids,
        max_length=13,
        do_sample=False,
        logits_processor=LogitsProcessorList([spy]),
        eos_token_id=None,
        pad_token_id=0,
    )
    assert out.shape == (2, 13)
    assert seen == [10, 11, 12]
    only_new = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), **GENERATION
    )
    assert torch.equal(only_new, model.generate(ids, **GENERATION)[:, 10:])


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("gemma3n_text", "causal-lm"),
        ("layoutlm", "masked-lm"),
        ("umt5", "token-classification"),
        ("t5gemma", "seq2seq-lm"),
    ],
)
@torch.no_grad()
def test_what_else_reads_ids_or_goes_by_tokens(kind, head):
    """A second table of embeddings, boxes on the page, results of an encoder alone, a decoder's own table."""
    from petune_bench.coverage import checks, tiny

    model = tiny.build(kind, head, tiny.architectures()[kind][head])
    inputs = tiny.batch(model)
    base = checks.output(model, inputs)
    tuning = petune.attach(model, "prompt-tuning", length=4)
    out = checks.output(model, inputs)
    assert out.shape == base.shape
    assert not torch.allclose(out, base)
    tuning.detach()
    assert torch.equal(checks.output(model, inputs), base)


def test_a_model_without_a_table_refuses():
    from petune_bench.coverage import tiny

    model = tiny.build("canine", "token-classification", "CanineForTokenClassification")
    with pytest.raises(petune.UnsupportedError, match="more embeddings than tokens"):
        petune.attach(model, "prompt-tuning")
