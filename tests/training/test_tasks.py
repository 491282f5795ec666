import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from samples import save_decoder

import petune
from petune import PetuneError
from petune.training import load_recipe
from petune.training.setup import make_model, make_task


def classification(
    recipe: dict[str, Any], rows: list[dict[str, Any]]
) -> tuple[Any, Dataset]:
    task = make_task(load_recipe(recipe))
    table = Dataset.from_list(rows)
    task.fit(table)
    return task, table


@pytest.mark.parametrize(
    "labels",
    [["neg", "pos"], [0, 1], [3, 7], [False, True]],
    ids=["names", "integers", "far integers", "booleans"],
)
def test_labels_come_back_as_they_were_given(
    recipe: dict[str, Any], labels: list[Any]
) -> None:
    task, rows = classification(
        recipe, [{"text": "good", "label": label} for label in labels * 3]
    )
    assert task.encode(rows[1])["labels"] == 1
    fresh = make_task(load_recipe(recipe), task.state())
    model = make_model(load_recipe(recipe), fresh)
    assert set(fresh.predict(model, rows)) <= set(labels)
    assert model.config.id2label == {0: str(labels[0]), 1: str(labels[1])}


def test_fractions_are_no_classes(recipe: dict[str, Any]) -> None:
    with pytest.raises(PetuneError, match=r"fractions such as 0\.5"):
        classification(
            recipe, [{"text": "good", "label": 0.5}, {"text": "bad", "label": 1.0}]
        )


def test_an_unseen_label_is_a_miss_and_only_unseen_ones_an_error(
    recipe: dict[str, Any],
) -> None:
    task, rows = classification(
        recipe, [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}]
    )
    model = make_model(load_recipe(recipe), task)
    right = task.predict(model, rows)
    told = [{"text": "good", "label": right[0]}, {"text": "bad", "label": right[1]}]
    assert task.score(model, Dataset.from_list(told))["accuracy"] == 1.0
    assert task.score(
        model, Dataset.from_list([*told, {"text": "fine", "label": "meh"}])
    )["accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(PetuneError, match="'meh': no label here occurs"):
        task.score(model, Dataset.from_list([{"text": "fine", "label": "meh"}]))


def test_pairs_and_texts_without_a_token(recipe: dict[str, Any], decoder: Path) -> None:
    task, _ = classification(
        recipe, [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    )
    pair = task.encode({"text": "good", "text_pair": "bad film", "label": 0})
    assert len(pair["input_ids"]) > len(
        task.encode({"text": "good", "label": 0})["input_ids"]
    )
    bare, _ = classification(
        {**recipe, "model": str(decoder)},
        [{"text": "a", "label": 0}, {"text": "b", "label": 1}],
    )
    assert len(bare.encode({"text": "", "label": 0})["input_ids"]) == 1


def test_answers_do_not_depend_on_the_batch(recipe: dict[str, Any]) -> None:
    recipe["training"]["eval_batch_size"] = 4
    texts = [
        "good",
        "bad film plot",
        "a very very sad movie",
        "day",
        "night one two three happy actor the the the",
    ]
    task, rows = classification(
        recipe, [{"text": t, "label": i % 2} for i, t in enumerate(texts)]
    )
    model = make_model(load_recipe(recipe), task)
    together = torch.tensor(task._logits(model, rows))
    alone = torch.cat(
        [torch.tensor(task._logits(model, rows.select([i]))) for i in range(len(texts))]
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert not model.training


def generator(recipe: dict[str, Any]) -> tuple[Any, Any]:
    loaded = load_recipe(recipe)
    task = make_task(loaded)
    return task, make_model(loaded, task)


def test_the_loss_is_on_the_completion_alone(generation: dict[str, Any]) -> None:
    task, _ = generator(generation)
    example = task.encode({"prompt": "good movie", "completion": "the one"})
    words = task.tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert words == ["good", "movie", "the", "one", "</s>"]
    assert example["labels"] == [-100, -100, *example["input_ids"][2:]]


def test_a_long_prompt_loses_its_middle(generation: dict[str, Any]) -> None:
    task, _ = generator({**generation, "training": {"max_length": 8}})
    example = task.encode(
        {
            "prompt": "one two three good bad fine awful movie film",
            "completion": "the one",
        }
    )
    words = task.tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert words == ["one", "two", "awful", "movie", "film", "the", "one", "</s>"]


def test_a_chat_template_is_used_where_there_is_one(
    generation: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_decoder(tmp_path / "chat")
    tokenizer = petune.load_tokenizer(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}the {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} actor{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    task, _ = generator({**generation, "model": str(folder)})
    example = task.encode({"prompt": "movie", "completion": "good"})
    assert task.tokenizer.convert_ids_to_tokens(example["input_ids"]) == [
        "the",
        "movie",
        "actor",
        "good",
        "</s>",
    ]
    assert example["labels"][:3] == [-100] * 3


def test_generation_does_not_depend_on_the_batch(generation: dict[str, Any]) -> None:
    task, model = generator(generation)
    rows = Dataset.from_list(
        [{"prompt": p} for p in ("good", "a very very sad movie film plot", "one two")]
    )
    together = task.predict(model, rows)
    assert together == [task.predict(model, rows.select([i]))[0] for i in range(3)]
    assert all(len(text.split()) <= 4 for text in together)


def test_scores_of_generation(
    generation: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model = generator(generation)
    rows = Dataset.from_list([
        {"prompt": "one", "completion": ["The one.", "one"]}, {"prompt": "two", "completion": ["three", "two"]},
    ])  # fmt: skip
    monkeypatch.setattr(task, "predict", lambda *_: ["the  one", "good"])
    scores = task.score(model, rows)
    assert scores["exact_match"] == 0.5
    assert 0.3 < scores["chrf"] < 0.6
    losses = []
    for row in rows:
        batch = task.collate([task.encode(row)])
        losses.append(
            (model(**batch).loss.item(), int((batch["labels"] != -100).sum()))
        )
    mean = sum(loss * count for loss, count in losses) / sum(
        count for _, count in losses
    )
    assert scores["loss"] == pytest.approx(mean, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)


def test_generation_uses_the_cache_also_while_training(
    generation: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model = generator(generation)
    model.config.use_cache = False
    lengths: list[int] = []
    whole = type(model).forward

    def watched(self: Any, input_ids: Any = None, **more: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return whole(self, input_ids, **more)

    monkeypatch.setattr(type(model), "forward", watched)
    task.predict(model, Dataset.from_list([{"prompt": "one two three"}]))
    assert lengths[0] == 3
    assert set(lengths[1:]) <= {1}
