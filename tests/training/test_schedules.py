"""Methods that ask more of the training than a gradient, and several methods in one recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
from samples import changed, same_weights, weights

from petune import PetuneError
from petune.training import evaluate, load_recipe, train
from petune.training.recorder import Recorder
from petune.training.signals import Interrupted
from petune.training.trainer import AdapterTrainer

MAM = {
    "method": ["prefix-tuning", "parallel-adapter"],
    "method_args": {"prefix-tuning": {"length": 5}},
}


def test_several_methods_in_a_recipe(recipe: dict[str, Any]) -> None:
    result = train({**recipe, **MAM}, quiet=True)
    config = json.loads(
        (Path(recipe["output"]) / "adapter" / "adapter.json").read_text()
    )
    assert config["method"] == MAM["method"]
    assert config["arguments"]["prefix-tuning"] == {"length": 5, "hidden": None}
    assert config["arguments"].keys() == set(MAM["method"])
    assert {key.partition(":")[0] for key in weights(recipe["output"])} > set(
        MAM["method"]
    )
    assert evaluate(recipe["output"])["score"] == result.score


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": ["lora", "ia4"]}, "unknown method 'ia4'. Did you mean 'ia3'"),
        (
            {"method": ["lora", "ia3"], "method_args": {"rank": 4}},
            "arguments go by method in a list",
        ),
        (
            {"method": ["lora", "ia3"], "method_args": {"lora": {"rnak": 4}}},
            "argument of method 'lora': 'rnak'",
        ),
        (
            {"method": ["lora", "ia3"], "method_args": {}, "where": "q"},
            "with several methods, where=",
        ),
        (
            {"method": "lora", "where": {"lora": "q"}},
            "a string, as there is one method",
        ),
        ({"method": 3}, "method: 3 should be a valid string"),
    ],
)
def test_a_mistake_in_the_methods(
    recipe: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(PetuneError, match=message) as caught:
        load_recipe({**recipe, **change}).check(source="recipe.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adafactor"])
def test_lora_plus_with_any_optimizer(
    recipe: dict[str, Any], monkeypatch: Any, optimizer: str
) -> None:
    made = []
    whole = AdapterTrainer.create_optimizer

    def watch(self: AdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        made.append((self, whole(self, *args, **kwargs)))
        return made[-1][1]

    monkeypatch.setattr(AdapterTrainer, "create_optimizer", watch)
    recipe["method_args"] = {"lr_ratio": 4.0}
    train(
        changed(recipe, optimizer=optimizer, schedule="constant", weight_decay=0.1),
        quiet=True,
    )
    trainer, made_optimizer = made[0]
    names = {id(p): name for name, p in trainer.tuning.state()}
    rates = {
        names[id(p)]: group["lr"]
        for group in made_optimizer.param_groups
        for p in group["params"]
    }
    assert rates.keys() == {
        name for name, p in trainer.tuning.state() if p.requires_grad
    }
    for name, rate in rates.items():
        assert rate == pytest.approx(4e-2 if name.endswith(".B") else 1e-2), name
    decays = {
        names[id(p)]: group["weight_decay"]
        for group in made_optimizer.param_groups
        for p in group["params"]
    }
    assert {name for name, decay in decays.items() if not decay} == {
        "classifier.module.bias"
    }


def test_adalora_cuts_to_its_budget_and_resumes(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    recipe = changed(recipe, steps=30, checkpoint_every=11)
    recipe |= {"method": "adalora", "method_args": {"rank": 5, "target": 2, "every": 2}}
    whole, broken = (
        {**recipe, "output": str(tmp_path / name)} for name in ("whole", "broken")
    )
    train(whole, quiet=True)
    after = Recorder.on_step_end

    def stop(self: Recorder, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.stopping = state.global_step == 14
        after(self, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", stop)
        with pytest.raises(Interrupted):
            train(broken, quiet=True)
    train(broken, quiet=True, resume=True)
    found = weights(whole["output"])
    assert same_weights(found, weights(broken["output"]))
    left = [
        int((tensor != 0).sum())
        for name, tensor in found.items()
        if name.endswith(".e")
    ]
    assert sum(left) == 2 * len(left)
    assert {name.rpartition(".")[2] for name in found} >= {"Q", "e", "P"}
    assert not [name for name in found if "mean" in name or "keep" in name], (
        "what only training needs was saved"
    )


def test_loreft_knows_the_prompt_in_training_and_in_scoring(
    generation: dict[str, Any],
) -> None:
    """The held-out loss is that of the prompt edited and the completion not, however the labels are handed over."""
    generation |= {"method": "loreft", "method_args": {"first": 1, "last": 1}}
    metrics = []
    for labelled in (True, False):
        run = changed(generation, labelled_logits=labelled, steps=10)
        train(run, quiet=True, overwrite=True)
        metrics.append(evaluate(run["output"])["loss"])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
