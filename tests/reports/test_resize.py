"""A vocabulary that changes under a tuning: followed where the tuning is elsewhere, refused where it is there."""

import copy

import pytest
import torch

import petune
from petune.testing import tiny_model

AT_A_TABLE = {
    "lora at the head": ("lora", {"where": "head"}),
    "a trained table": ("lora", {"train": ["model.embed_tokens"]}),
    "a trained head": ("lora", {"train": ["lm_head"]}),
    "trainable tokens": ("trainable-tokens", {"ids": [3, 5]}),
    "all of it": ("full", {}),
}
ELSEWHERE = {
    "lora": {},
    "prompt-tuning": {"length": 3},
    "p-tuning": {"length": 3},
    "prefix-tuning": {"length": 3},
    "loreft": {},
    "last-layers": {},
}
SIZES = [131, 120]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.filterwarnings("ignore:.*tied to it")
@pytest.mark.parametrize("case", AT_A_TABLE)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_resize_under_a_tuning_of_the_tables_is_refused(case, size, tied):
    model = tiny_model("llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    method, arguments = AT_A_TABLE[case]
    tuning = petune.attach(model, method, **arguments)
    ids = torch.arange(4, 12)[None]
    before = logits(model, ids)
    with pytest.raises(
        petune.PetuneError, match=r"tuning 'default' acts at .*before attach"
    ):
        model.resize_token_embeddings(size)
    assert torch.equal(logits(model, ids), before)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    tuning.detach()
    model.resize_token_embeddings(size)
    assert model.get_input_embeddings().num_embeddings == size


@pytest.mark.parametrize("method", ELSEWHERE)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_tuning_elsewhere_follows_a_resize(method, size, family, tmp_path):
    """As if the base had been resized first, before and after it is saved and loaded."""
    model = tiny_model(family)
    tuning = petune.attach(model, method, **ELSEWHERE[method])
    tuning.save(tmp_path)
    torch.manual_seed(0)  # new rows are drawn
    model.resize_token_embeddings(size)
    wanted = tiny_model(family)
    torch.manual_seed(0)
    wanted.resize_token_embeddings(size)
    petune.load(wanted, tmp_path)
    ids = torch.tensor([[4, 7, size - 1]])
    inputs = {"input_ids": ids, "labels": ids}
    ours, theirs = model(**inputs), wanted(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=0)
    trained = {id(p) for p in tuning.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), wanted.generate(ids, **options))
    tuning.detach()
    assert model.get_input_embeddings().num_embeddings == size


def test_a_saved_table_does_not_fit_another_vocabulary(tmp_path):
    for number, (method, arguments) in enumerate(AT_A_TABLE.values()):
        if method == "full":
            continue
        model = tiny_model("llama")
        petune.attach(model, method, **arguments).save(tmp_path / str(number))
        other = tiny_model("llama")
        other.resize_token_embeddings(2 if method == "trainable-tokens" else 131)
        plain = copy.deepcopy(other)
        with pytest.raises(petune.PetuneError, match=r"does not fit|numbers below 2"):
            petune.load(other, tmp_path / str(number))
        batch = {"input_ids": torch.tensor([[0, 1]])}
        assert torch.equal(other(**batch).logits, plain(**batch).logits)


def test_a_table_is_not_replaced_under_a_tuning():
    model = tiny_model("llama")
    head, table = torch.nn.Linear(64, 128, bias=False), torch.nn.Embedding(128, 64)
    tuning = petune.attach(model, "lora", where="head")
    with pytest.raises(petune.PetuneError, match=r"replacing a Linear .* lm_head"):
        model.set_output_embeddings(head)
    tuning.detach()
    tuning = petune.attach(model, "prompt-tuning", length=2)
    with pytest.raises(petune.PetuneError, match="virtual tokens of tuning 'default'"):
        model.set_input_embeddings(table)
    model.set_output_embeddings(head)
    tuning.detach()
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table
    assert model.get_output_embeddings() is head
