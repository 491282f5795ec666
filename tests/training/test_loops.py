"""`petune.lean` in everybody's own loop: the numbers stay, the bytes do not, and nothing is left on the model."""

import copy
import inspect
import io
from contextlib import nullcontext
from functools import partial
from itertools import product

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from shaken import checkpoints, shaken
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import petune
from petune.testing import tiny_batch, tiny_model
from petune.training.memory import measure_step
from petune.training.recompute import forward

FAMILIES = ["llama", "gpt2", "bert", "t5"]
SOME = [
    "llama",
    "bert",
    *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "t5")),
]
"""The same, where a loop takes long; the others run with the slow tests."""
STEPS = 5


@pytest.fixture(autouse=True)
def _also_what_is_small(monkeypatch):
    monkeypatch.setattr(forward, "LEAST", 0)


def worn(model):
    """The modules on which another forward was left."""
    return [name for name, m in model.named_modules() if "forward" in vars(m)]


def same(found, wanted, rtol=1e-5):
    """Equal to so much of the largest entry."""
    assert found.keys() == wanted.keys()
    largest = max(float(t.abs().max()) for t in wanted.values())
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one, rtol=0, atol=rtol * largest)


def gradients(model):
    return {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def kept(model, batch):
    """The bytes that backward keeps."""
    optimizer = torch.optim.SGD(p for p in model.parameters() if p.requires_grad)
    return measure_step(model, optimizer, lambda: model(**batch).loss)[1]


def batches(family):
    return [tiny_batch(family, rows=4, length=16, padding=p) for p in (9, 3, 6, 0, 1)]


def compared(make, run):
    """(losses, gradients or parameters) of a loop without `lean` and with it, and both models."""
    plain, ours = make(), make()
    wanted, found = run(plain, nullcontext()), run(ours, petune.lean(ours))
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    same(found[1], wanted[1])
    assert worn(ours) == worn(plain)
    return plain, ours


def plain_loop(model, context, wrap=lambda model: model, family="llama"):
    called = wrap(model.train())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    losses = []
    with context:
        for batch in batches(family):
            optimizer.zero_grad()
            loss = called(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    return losses, gradients(model)


def adapted(family, **options):
    model = tiny_model(family)
    torch.manual_seed(0)
    shaken(model, "lora", **options)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "checkpointing",
    [None, {}, pytest.param({"use_reentrant": True}, marks=pytest.mark.slow)],
)
def test_a_plain_loop(family, checkpointing):
    def make():
        model = adapted(family).train()
        if checkpointing is not None:
            checkpoints(model, checkpointing or None)
            model.enable_input_require_grads()
        return model

    plain, ours = compared(make, partial(plain_loop, family=family))
    if checkpointing is None:
        batch = batches(family)[0]
        more = kept(plain, batch)
        with petune.lean(ours):
            assert kept(ours, batch) < 0.9 * more
        assert kept(ours, batch) == pytest.approx(more, rel=0.01)


def lora(family="llama"):
    """PEFT's own LoRA."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(tiny_model(family), config)


@pytest.mark.parametrize("family", SOME)
def test_pefts_own_lora(family):
    plain, ours = compared(partial(lora, family), partial(plain_loop, family=family))
    batch = batches(family)[0]
    with petune.lean(ours):
        assert kept(ours, batch) < 0.8 * kept(plain, batch)


def trained(trainer):
    trainer.train()
    log = trainer.state.log_history
    return [row["loss"] for row in log if "loss" in row]


SETTINGS = {"max_steps": STEPS, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
            "logging_steps": 1, "use_cpu": True, "learning_rate": 1e-4}  # fmt: skip


def rows_of(family):
    """The rows of the batches, cut where their padding begins."""
    rows = []
    for batch in batches(family):
        for i in range(4):
            size = int(batch["attention_mask"][i].sum())
            labels = batch["labels"][i]
            row = {"input_ids": batch["input_ids"][i][:size].tolist()}
            row["attention_mask"] = [1] * size
            is_token = labels.dim() and family != "t5"
            row["labels"] = (labels[:size] if is_token else labels).tolist()
            rows.append(row)
    return rows


def collate(family, rows):
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded = {}
    for key, value in fill.items():
        values = [row[key] for row in rows]
        if key != "labels" or family in ("llama", "gpt2"):
            values = [v + [value] * (length - len(v)) for v in values]
        padded[key] = torch.tensor(values)
    return padded


def in_trainer(family, tmp_path, leanly, **settings):
    model = adapted(family)
    options = {"per_device_train_batch_size": 4, **SETTINGS, **settings}
    arguments = transformers.TrainingArguments(str(tmp_path), **options)
    collator = partial(collate, family)
    trainer = transformers.Trainer(
        model, arguments, data_collator=collator, train_dataset=rows_of(family)
    )
    if leanly:
        assert petune.lean_trainer(trainer) is trainer
    return trained(trainer), model, trainer


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        pytest.param({"bf16": True}, marks=pytest.mark.slow),
    ],
    ids=["as it comes", "accumulation", "checkpointing", "bf16"],
)
def test_transformers_trainer(family, settings, tmp_path):
    wanted, plain, _ = in_trainer(family, tmp_path, False, **settings)
    found, ours, trainer = in_trainer(family, tmp_path, True, **settings)
    close = 1e-2 if "bf16" in settings else 1e-5
    assert len(found) == STEPS
    assert found == pytest.approx(wanted, rel=close)
    assert worn(ours) == worn(plain)
    wanted, found = (
        {n: p.detach() for n, p in m.named_parameters() if p.requires_grad}
        for m in (plain, ours)
    )
    same(found, wanted, rtol=1e-3 if "bf16" in settings else 1e-4)
    trainer.args.remove_unused_columns = False
    told = trainer.predict(rows_of(family)[:2])
    assert told.predictions is not None


def tokenizer():
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnop"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def sft(model, folder):
    trl = pytest.importorskip("trl")
    rows = [
        {"prompt": "a b c " * (i + 1), "completion": "d e f " * (4 - i)}
        for i in range(4)
    ]
    settings = trl.SFTConfig(
        str(folder), per_device_train_batch_size=2, bf16=False, **SETTINGS
    )
    return trl.SFTTrainer(
        model,
        settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def dpo(model, folder):
    trl = pytest.importorskip("trl")
    rows = [
        {"prompt": "a b c ", "chosen": "d e " * (i + 1), "rejected": "f g h "}
        for i in range(4)
    ]
    settings = trl.DPOConfig(
        str(folder), per_device_train_batch_size=2, bf16=False, **SETTINGS
    )
    reference = None if hasattr(model, "peft_config") else tiny_model("llama")
    return trl.DPOTrainer(
        model,
        ref_model=reference,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("make", [sft, dpo])
@pytest.mark.parametrize(
    ("model", "how"),
    [
        (partial(adapted, "llama"), "trainer"),
        pytest.param(lora, "context", marks=pytest.mark.slow),
    ],
)
def test_trl(make, model, how, tmp_path):
    plain = make(model(), tmp_path)
    ours = make(model(), tmp_path)
    wanted = trained(plain)
    with petune.lean(ours.model) if how == "context" else nullcontext():
        found = trained(ours if how == "context" else petune.lean_trainer(ours))
    assert len(found) == STEPS
    assert found == pytest.approx(wanted, rel=1e-5)
    assert worn(ours.model) == worn(plain.model)
    batch = {**tiny_batch("llama"), "fused_lm_head": True}
    inner = next(m for m in ours.model.modules() if "forward" in vars(m))
    assert inner(**batch).log_probs is not None, "TRL's own forward still works"


@pytest.mark.parametrize("make", [sft, dpo])
def test_trl_keeps_less(make, tmp_path):
    trainer = make(adapted("llama"), tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    optimizer = trainer.create_optimizer()

    def bytes_kept():
        def loss():
            return trainer.compute_loss(trainer.model, dict(batch))

        return measure_step(trainer.model, optimizer, loss)[1]

    more = bytes_kept()
    with petune.lean(trainer.model):
        assert bytes_kept() < 0.9 * more


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("order", ["prepared first", "prepared within"])
def test_accelerate(family, precision, order):
    def run(leanly):
        AcceleratorState._reset_state()
        model = adapted(family).train()
        accelerator = Accelerator(mixed_precision=precision, cpu=True)
        optimizer = torch.optim.AdamW(petune.tunings(model)["default"].parameters())
        context = petune.lean(model) if leanly else nullcontext()
        losses = []
        if order == "prepared first":
            called, optimizer = accelerator.prepare(model, optimizer)
        with context:
            if order == "prepared within":
                called, optimizer = accelerator.prepare(model, optimizer)
            for batch in batches(family):
                optimizer.zero_grad()
                loss = called(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                losses.append(float(loss))
        return losses, model

    wanted, plain = run(False)
    found, ours = run(True)
    assert found == pytest.approx(wanted, rel=1e-2 if precision == "bf16" else 1e-5)
    assert worn(ours) == worn(plain)
    batch = batches(family)[0]
    assert ours(**batch).logits.shape == plain(**batch).logits.shape


def test_one_process_of_several(tmp_path):
    file = f"file://{tmp_path}/group"
    torch.distributed.init_process_group("gloo", file, rank=0, world_size=1)
    try:
        wrap = nn.parallel.DistributedDataParallel
        compared(partial(adapted, "llama"), partial(plain_loop, wrap=wrap))
        model = wrap(adapted("llama").train())
        batch = batches("llama")[0]
        more = kept(model, batch)
        with petune.lean(model):
            assert kept(model, batch) < 0.8 * more
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_call_gives(family):
    model = adapted(family).train()
    batch = batches(family)[0]
    wanted = model(**batch)
    with petune.lean(model):
        within = model(**batch)
        with torch.no_grad():
            evaluated = model(**batch)
        rest = {k: v for k, v in batch.items() if k != "labels"}
        if family == "t5":
            rest["decoder_input_ids"] = batch["labels"]
        unlabelled = model(**rest)
        every = model(**batch, output_hidden_states=True)
        (loss, *_) = model(**batch, return_dict=False)
    assert family == "bert" or within.logits is None
    assert within.get("past_key_values") is None
    torch.testing.assert_close(evaluated.logits, wanted.logits)
    assert unlabelled.logits.requires_grad
    torch.testing.assert_close(loss, wanted.loss)
    torch.testing.assert_close(every.logits, wanted.logits)
    with_states = model(**batch, output_hidden_states=True)
    key = "encoder_hidden_states" if family == "t5" else "hidden_states"
    for one, other in zip(every[key], with_states[key], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_without_labels_is_the_models_own_to_its_last_entry(family):
    """Padding included: somebody may take the mean over it."""
    model = adapted(family).train()
    batch = batches(family)[0]
    labels = batch.pop("labels")
    if family == "t5":
        batch["decoder_input_ids"] = labels
    wanted = model(**batch)
    with petune.lean(model):
        found = model(**batch)
    assert torch.equal(found.logits, wanted.logits)
    if "past_key_values" in wanted:
        cached, plain = found.past_key_values, wanted.past_key_values
        assert cached.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize(
    ("family", "key"),
    [
        *product(
            ["llama", "gpt2", "bert"], ["output_hidden_states", "output_attentions"]
        ),
        ("bert", "return_dict"),
    ],
)
def test_what_a_configuration_asks_for_is_given(family, key):
    model = adapted(family).train()
    if key == "output_attentions":
        model.set_attn_implementation("eager")
    setattr(model.config, key, key != "return_dict")
    batch = batches(family)[0]
    wanted = model(**batch)
    with petune.lean(model):
        found = model(**batch)
    flat = partial(torch.utils._pytree.tree_leaves)
    for one, other in zip(flat(found), flat(wanted), strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", ["llama", "gpt2", "masked"])
@pytest.mark.parametrize("fault", ["labels in padding", "left", "gap"])
def test_padding_that_a_loss_reads(family, fault):
    """Who takes the ids as labels as they are has them in the padding too; the plain loop counts them."""
    if family == "masked":
        config = tiny_model("bert").config
        torch.manual_seed(0)
        model = transformers.BertForMaskedLM(config).train()
    else:
        model = adapted(family).train()
    batch = tiny_batch("llama", rows=4, length=16, padding=9)
    mask = batch["attention_mask"]
    if fault == "left":
        mask[0] = mask[0].flip(0)
        mask[1, :4] = 0
    elif fault == "gap":
        mask[0, 3:7] = 0
        mask[2, 5:9] = 0
    batch["labels"] = batch["input_ids"].clone()
    if fault != "labels in padding":
        batch["labels"][mask == 0] = -100
    model(**batch).loss.backward()
    wanted, found = gradients(model), None
    model.zero_grad()
    with petune.lean(model):
        loss = model(**batch).loss
        loss.backward()
    found = gradients(model)
    torch.testing.assert_close(loss, model(**batch).loss)
    same(found, wanted)


def test_labels_that_are_shifted_already():
    model = adapted("llama").train()
    batch = batches("llama")[0]
    batch["shift_labels"] = batch["labels"].roll(-3, 1)
    wanted = model(**batch).loss
    with petune.lean(model):
        torch.testing.assert_close(model(**batch).loss, wanted)


def test_a_module_of_ones_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            layers = nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Dropout(0.1)
            self.layers = nn.Sequential(*layers, nn.Linear(64, 2))

        def forward(self, x, labels):
            return nn.functional.cross_entropy(self.layers(x), labels)

    torch.manual_seed(0)
    model, x, labels = Own(), torch.randn(64, 64), torch.arange(64) % 2

    def step():
        torch.manual_seed(1)
        model.zero_grad()
        loss = model(x, labels=labels)
        loss.backward()
        return loss, gradients(model)

    loss, wanted = step()
    with petune.lean(model):
        ours, found = step()
    assert torch.equal(ours, loss)
    same(found, wanted, rtol=0)


def test_experts_that_take_so_many_tokens_of_a_row():
    """End to end the rows' tokens would count as those of one row, of which some are passed over."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=128,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        num_experts=2,
        expert_capacity=8,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.SwitchTransformersForConditionalGeneration(config).train()
    batch = tiny_batch("t5", rows=4, length=16, padding=9)
    wanted = model(**batch).loss
    with petune.lean(model):
        torch.testing.assert_close(model(**batch).loss, wanted)


@pytest.mark.parametrize("fault", [None, "left"])
def test_heads_that_read_padding(fault):
    """The end of an answer is sought among all places, those of padding too; a class is read at the first."""
    for head, labels in (
        ("QuestionAnswering", {"start_positions": 1, "end_positions": 2}),
        ("SequenceClassification", {"labels": 1}),
    ):
        torch.manual_seed(0)
        config = tiny_model("bert").config
        config.num_labels = 2
        model = getattr(transformers, f"BertFor{head}")(config).train()
        batch = tiny_batch("bert", rows=4, length=16, padding=9)
        if fault:
            batch["attention_mask"] = batch["attention_mask"].flip(1)
        batch |= {key: torch.full((4,), value) for key, value in labels.items()}
        if head == "QuestionAnswering":
            del batch["labels"]
        wanted = model(**batch).loss
        with petune.lean(model):
            torch.testing.assert_close(model(**batch).loss, wanted)


def test_routed_batches():
    model = tiny_model("llama").train()
    for name in ("one", "other"):
        shaken(model, "lora", name)
    batch = batches("llama")[0]
    rows = ["one", None, "other", "one"]

    def step():
        model.zero_grad()
        with petune.route(model, rows):
            out = model(**batch)
        out.loss.backward()
        return out, gradients(model)

    wanted, plain = step()
    with petune.lean(model):
        found, ours = step()
    torch.testing.assert_close(found.logits, wanted.logits)
    same(ours, plain)


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
@pytest.mark.parametrize("family", SOME)
def test_virtual_tokens(family, method):
    def make():
        model = tiny_model(family)
        torch.manual_seed(0)
        shaken(model, method)
        return model

    compared(make, partial(plain_loop, family=family))


@pytest.mark.parametrize("family", SOME)
def test_twice_and_nested(family):
    def nested(model, context):
        with context:
            return plain_loop(model, petune.lean(model, packing=False), family=family)

    def twice(model, context):
        with context:
            pass
        return plain_loop(model, petune.lean(model), family=family)

    compared(partial(adapted, family), nested)
    compared(partial(adapted, family), twice)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_leaves_the_model_clean(family):
    model = adapted(family).train()
    batch = batches(family)[0]
    wanted = model(**batch)
    block = next(
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1
    )[-1]

    def stumbles(*_):
        raise ZeroDivisionError

    hook = block.register_forward_pre_hook(stumbles)
    with pytest.raises(ZeroDivisionError), petune.lean(model):
        model(**batch)
    assert not worn(model)
    with petune.lean(model):
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        hook.remove()
        torch.testing.assert_close(model(**batch).loss, wanted.loss)
    assert not worn(model)
    assert torch.equal(model(**batch).logits, wanted.logits)


@pytest.mark.parametrize("make", [partial(adapted, "llama"), partial(tiny_model, "t5")])
def test_a_copy_made_within_is_a_model_of_its_own(make):
    """An average of weights, or a reference, is copied inside many a loop."""
    model = make().train()
    batch = batches(model.config.model_type)[0]
    with petune.lean(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0)
        assert float(other(**batch).loss) != float(model(**batch).loss)
        assert other(**batch).logits is not None
    other.zero_grad()
    other(**batch).loss.backward()
    assert not gradients(model)
    assert gradients(other)


@pytest.mark.parametrize("within", [True, False])
def test_saved(within):
    model = tiny_model("llama")
    batch, file = batches("llama")[0], io.BytesIO()
    with petune.lean(model):
        model(**batch).loss.backward()
        if within:
            torch.save(model, file)
    if not within:
        torch.save(model, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    assert torch.equal(read(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_signature_is_the_models(family):
    """Trainers read the columns that a model takes from it."""
    model = adapted(family)
    wanted = inspect.signature(model.forward)
    with petune.lean(model):
        assert inspect.signature(model.forward) == wanted
