"""The loss from labelled rows in chunks against the model's own, and what it keeps."""

import pytest
import torch
import transformers
from shaken import shaken
from torch.utils._python_dispatch import TorchDispatchMode

import petune
from petune.testing import tiny_batch, tiny_model
from petune.training import labelled_logits
from petune.training.logits import applies

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
SIZES |= {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        GROUPED | {"final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED),
    "cohere": ("CohereForCausalLM", "CohereConfig", SIZES | {"logit_scale": 0.3}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        GROUPED | {"output_router_logits": True},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        SIZES | {"cls_token_id": 1, "sep_token_id": 2},
    ),
}


def built(name):
    if name not in MODELS:
        return tiny_model(name)
    model, config, arguments = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**arguments)
    return (
        getattr(transformers, model)
        ._from_config(config, attn_implementation="eager")
        .eval()
    )


def labelled():
    ids = torch.randint(4, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = labels[0, 6] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model, tuning, batch):
    loss = model(**batch).loss
    return loss, torch.autograd.grad(loss, tuning.parameters(), allow_unused=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", *MODELS])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"where": "q v head"}),
        ("prompt-tuning", {}),
        ("last-layers", {"train": None}),
    ],
)
def test_equal_to_the_models_own(name, method, options):
    model = built(name)
    assert applies(model)
    tuning = shaken(model, method, **options)
    for more in ({}, {"num_items_in_batch": 11}):
        batch = labelled() | more
        loss, gradients = loss_and_gradients(model, tuning, batch)
        with labelled_logits(model, rows=4):
            ours, found = loss_and_gradients(model, tuning, batch)
            with torch.no_grad():
                torch.testing.assert_close(model(**batch).loss, loss)
        torch.testing.assert_close(ours, loss)
        for one, other in zip(found, gradients, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(
                    one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()) + 1e-8
                )
    assert "_loss_function" not in vars(model)
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_full_fine_tuning_of_tied_weights():
    model = built("gemma3")
    tuning = petune.attach(model, "full")
    _, gradients = loss_and_gradients(model, tuning, labelled())
    with labelled_logits(model, rows=4):
        _, found = loss_and_gradients(model, tuning, labelled())
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_no_tensor_of_logits_is_kept_or_made_whole():
    config = transformers.LlamaConfig(vocab_size=5000, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2)  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    petune.attach(model, "lora")
    ids = torch.randint(4, 5000, (2, 50))
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (5000,):
                largest = max(largest, out.numel() // 5000)
            return out

    with labelled_logits(model, rows=32), Largest():
        model(input_ids=ids, labels=ids).loss.backward()
    assert largest == 32


def test_others_are_left_alone():
    for family in ("bert", "t5"):
        model, batch = tiny_model(family), tiny_batch(family)
        before = model(**batch).loss
        with labelled_logits(model):
            assert torch.equal(model(**batch).loss, before)
    with labelled_logits(torch.nn.Linear(2, 2)):
        pass


def test_not_within_a_route():
    model = tiny_model("llama")
    petune.attach(model, "lora", name="one")
    refused = pytest.raises(petune.UnsupportedError, match="route")
    with refused, labelled_logits(model), petune.route(model, ["one", None]):
        model(**tiny_batch("llama"))
