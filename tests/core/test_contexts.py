"""What a `with` sets belongs to the context that set it, and a forward keeps what it began with."""

import asyncio
import contextlib
import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from shaken import checkpoints, shaken

import petune
from petune.testing import tiny_batch, tiny_model
from petune.testing.behaviours import logits

METHODS = {"lora": {}, "prefix": {"length": 4}, "prompt": {"length": 3}, "houlsby": {}}
NAMES = {
    "lora": "lora",
    "prefix": "prefix-tuning",
    "prompt": "prompt-tuning",
    "houlsby": "houlsby",
}
OPTIONS = {
    "max_new_tokens": 4,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}


@pytest.fixture
def served():
    model = tiny_model("llama")
    for name, arguments in METHODS.items():
        shaken(model, NAMES[name], name, **arguments)
    return model


@torch.no_grad()
def answers(model, batch):
    """The logits of a routed forward, and the ids of a routed generation."""
    ids = batch["input_ids"]
    return model(ids).logits, model.generate(
        ids, attention_mask=torch.ones_like(ids), **OPTIONS
    )


@pytest.mark.parametrize("rounds", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_threads_route_for_themselves(served, rounds):
    """Four threads, each with a tuning of its own and mixed batches: every row as in the single run."""
    batch = tiny_batch("llama", padding=0)
    routes = [[name, None] for name in METHODS]
    want = []
    for names in routes:
        with petune.route(served, names):
            want.append(answers(served, batch))

    def work(i):
        for _ in range(rounds):
            with petune.route(served, routes[i]):
                got = answers(served, batch)
            assert torch.equal(got[0], want[i][0])
            assert torch.equal(got[1], want[i][1])
        return i

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [0, 1, 2, 3]


def test_threads_switch_and_weigh_for_themselves():
    model, batch = tiny_model("llama"), tiny_batch("llama")
    base = logits(model, batch)
    tuning = shaken(model, "lora")
    on = logits(model, batch)
    with tuning.weighted(0.5):
        half = logits(model, batch)
    assert not torch.allclose(half, on)
    begun, done = threading.Event(), threading.Event()

    def elsewhere():
        with tuning.disabled():
            begun.set()
            done.wait(60)
            return logits(model, batch), tuning.enabled

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(elsewhere)
        begun.wait(60)
        assert torch.equal(logits(model, batch), on)
        with tuning.weighted(0.5):
            assert torch.equal(logits(model, batch), half)
        assert tuning.enabled
        done.set()
        off, enabled = other.result()
    assert torch.equal(off, base)
    assert not enabled
    tuning.disable()  # the model's own switch, for everybody
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, model, batch).result(), base)


def test_tasks_route_for_themselves(served):
    batch = tiny_batch("llama", padding=0)
    want = {}
    for name in METHODS:
        with petune.route(served, [name, name]):
            want[name] = answers(served, batch)[0]

    async def work(name):
        with petune.route(served, [name, name]):
            for _ in range(3):
                await asyncio.sleep(0)  # the others' turn
                assert torch.equal(answers(served, batch)[0], want[name])

    async def all_of_them():
        await asyncio.gather(*map(work, METHODS))

    asyncio.run(all_of_them())


def test_compiled_code_sees_the_threads_settings_and_refuses_a_tasks():
    model, batch = tiny_model("llama", layers=1), tiny_batch("llama")
    base = logits(model, batch)
    tuning = shaken(model, "lora")
    ids = batch["input_ids"]
    torch.compiler.reset()
    compiled = torch.compile(
        lambda: model(ids, use_cache=False).logits, backend="eager", fullgraph=True
    )
    with torch.no_grad():
        on = compiled()
        with tuning.disabled():
            torch.testing.assert_close(
                compiled(), tiny_model("llama", layers=1)(ids).logits
            )
        assert torch.equal(compiled(), on)

        async def in_a_task():
            with tuning.disabled():
                compiled()

        with pytest.raises(Exception, match="asyncio"):
            asyncio.run(in_a_task())
        assert torch.equal(compiled(), on)
    assert base.shape == logits(model, batch).shape


def test_a_forward_keeps_what_it_began_with():
    """What a hook in the middle of a forward switches, and another thread meanwhile, counts from the next one on."""
    model, batch = tiny_model("llama"), tiny_batch("llama")
    tuning = shaken(model, "lora")
    on = logits(model, batch)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: tuning.disable())
    assert torch.equal(logits(model, batch), on)
    hook.remove()
    assert not torch.equal(logits(model, batch), on)


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_runs_a_block_as_its_forward_did(reentrant):
    """Gradient checkpointing runs blocks again after the `with` has ended, and after others have run."""
    model, batch = tiny_model("llama"), tiny_batch("llama", padding=0)
    one, two = shaken(model, "lora", "one"), shaken(model, "houlsby", "two")

    def gradients():
        model.zero_grad()
        with petune.route(model, ["one", "two"]):
            first = model(**batch, use_cache=False).loss
        with petune.route(model, ["two", None]):
            second = model(**batch, use_cache=False).loss
        one.disable()
        (first + 2 * second).backward()
        one.enable()
        return [p.grad for tuning in (one, two) for p in tuning.parameters()]

    model.train()
    want = gradients()
    checkpoints(model, {"use_reentrant": reentrant})
    for got, wanted in zip(gradients(), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_methods_whose_sites_share_notes_refuse_reentrant_checkpointing():
    model = tiny_model("llama")
    checkpoints(model, {"use_reentrant": True})
    with pytest.raises(petune.UnsupportedError, match="use_reentrant=False"):
        petune.attach(model, "ladder-side-tuning")
    assert not petune.tunings(model)
    assert type(model) is transformers.LlamaForCausalLM


def test_nothing_stays_behind_a_training_step():
    """After a backward a part of the model called by itself knows of no batch."""
    model, batch = tiny_model("llama"), tiny_batch("llama")
    petune.attach(model, "loreft")
    model.train()
    model(**batch).loss.backward()
    hidden = torch.zeros(2, 10, 64)
    with pytest.raises(petune.UnsupportedError, match="call the model itself"):
        model.model.layers[0](
            hidden,
            position_embeddings=model.model.rotary_emb(hidden, torch.arange(10)[None]),
        )


def test_attaching_and_detaching_wait_their_turn():
    """A change that begins while another thread runs a forward is refused; one that runs makes forwards wait."""
    model, batch = tiny_model("llama"), tiny_batch("llama")
    tuning = shaken(model, "lora")
    on = logits(model, batch)
    begun, done = threading.Event(), threading.Event()

    def wait(*_):
        begun.set()
        done.wait(60)

    hook = model.model.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(logits, model, batch)
        begun.wait(60)
        for change in (
            tuning.detach,
            tuning.merge,
            lambda: petune.attach(model, "ia3", name="more"),
        ):
            with pytest.raises(
                petune.PetuneError, match="another thread runs a forward"
            ):
                change()
        done.set()
        assert torch.equal(running.result(), on)
    hook.remove()
    assert list(petune.tunings(model)) == ["default"]
    errors = []

    def forwards():
        for _ in range(60):
            if not torch.equal(logits(model, batch), on):
                errors.append("other logits")

    threads = [threading.Thread(target=forwards) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with contextlib.suppress(petune.PetuneError):
            petune.attach(
                model, "lora", name="other", where="q@0"
            )  # a fresh one changes nothing
        while "other" in petune.tunings(model):
            with contextlib.suppress(petune.PetuneError):
                petune.tunings(model)["other"].detach()
    assert not errors


def test_route_takes_one_name_a_row(served):
    batch = tiny_batch("llama", rows=4, padding=0)
    with petune.route(served, ["lora", None]):
        with pytest.raises(petune.PetuneError, match="2 names for a batch of 4 rows"):
            served(batch["input_ids"])
        with pytest.raises(petune.PetuneError, match="2 names for a batch of 4 rows"):
            served.model.layers[0].self_attn.q_proj(torch.zeros(4, 3, 64))
        beams = served.generate(batch["input_ids"][:2], num_beams=2, **OPTIONS)
        assert beams.shape == (2, 14)


def test_an_adapted_model_is_pickled_and_copied(tmp_path):
    model, batch = tiny_model("llama"), tiny_batch("llama")
    shaken(model, "lora", "lora")
    shaken(model, "prompt-tuning", "prompt", length=3)
    on = logits(model, batch)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(logits(again, batch), on)
    twin = copy.deepcopy(model)
    for other in (again, twin):
        petune.tunings(other)["lora"].disable()
        assert not torch.equal(logits(other, batch), on)
        for tuning in petune.tunings(other).values():
            tuning.detach()
        assert torch.equal(logits(other, batch), logits(tiny_model("llama"), batch))
    assert torch.equal(logits(model, batch), on)
