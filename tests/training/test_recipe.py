from pathlib import Path
from typing import Any

import pytest
import yaml

from petune import PetuneError
from petune.training import Recipe, load_recipe

MINIMAL = {"model": "m", "task": "classification", "data": "d", "output": "o"}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    recipe = load_recipe(
        path,
        [
            "training.steps=10",
            "method_args.rank=4",
            "precision=bf16",
            "columns={text: a}",
        ],
    )
    assert recipe.training.steps == 10
    assert recipe.method_args == {"rank": 4}
    assert (recipe.precision, recipe.method, recipe.columns) == (
        "bf16",
        "lora",
        {"text": "a"},
    )


def test_overrides_leave_the_given_mapping_alone() -> None:
    values: dict[str, Any] = {**MINIMAL, "training": {"steps": 1}}
    load_recipe(values, ["training.steps=2", "training.seed=3"])
    assert values["training"] == {"steps": 1}


@pytest.mark.parametrize("written", ["1e-3", "1.0e-3", "0.001", "'1e-3'"])
def test_floats_as_people_write_them(tmp_path: Path, written: str) -> None:
    text = (
        yaml.safe_dump(MINIMAL)
        + f"training: {{learning_rate: {written}}}\nmethod_args: {{alpha: 2e1}}\n"
    )
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.training.learning_rate == 1e-3
    assert recipe.method_args["alpha"] == 20.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": "x"}, ["unknown key 'modle'", "Did you mean 'model'"]),
        (
            {"training": {"stpes": 3}},
            ["unknown key 'training.stpes'", "'training.steps'"],
        ),
        (
            {"training": {"steps": "ten"}},
            ["training.steps: 'ten' should be a valid integer"],
        ),
        ({"training": {"steps": 0}}, ["training.steps: 0 should be greater than 0"]),
        (
            {"training": {"steps": 3, "epochs": 1}},
            ["training.steps and training.epochs exclude each other"],
        ),
        ({"training": 3}, ["training: 3 should be a valid dictionary"]),
        ({"columns": {"text": 3}}, ["columns.text: 3 should be a valid string"]),
        ({"data": 3}, ["data: 3 should be a valid string"]),
        ({"model": None}, ["model: None should be a valid string"]),
    ],
)
def test_a_bad_key_or_value_is_named(
    tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    path = write(tmp_path, yaml.safe_dump({**MINIMAL, **change}))
    with pytest.raises(PetuneError) as error:
        load_recipe(path)
    said = str(error.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [", " line 1: "),
        ("model: a\nmodel: b", " line 2: key 'model' is given twice"),
        ("- a\n- b", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("task: classification\ndata: d\noutput: o", "key 'model' is missing"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(PetuneError, match=said) as error:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_bad_override(tmp_path: Path) -> None:
    with pytest.raises(PetuneError, match=r"nowhere\.yaml: No such file"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(PetuneError, match="write key=value"):
        load_recipe(MINIMAL, ["steps"])
    with pytest.raises(
        PetuneError, match=r"override 'data=\[': '\[' is not a YAML value"
    ):
        load_recipe(MINIMAL, ["data=["])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "lroa"}, ["unknown method 'lroa'", "Did you mean 'lora'"]),
        ({"method_args": {"rnak": 3}}, ["'rnak'", "'rank'"]),
        ({"method_args": {"rank": "big"}}, ["rank='big'"]),
        (
            {"task": "clasification"},
            ["unknown task 'clasification'", "'classification'"],
        ),
        ({"precision": "nf5"}, ["unknown precision 'nf5'", "'nf4'", "bf16"]),
        ({"head": "causal"}, ["head: ", "'causal-lm'"]),
        ({"data": "vader-movis"}, ["unknown data set 'vader-movis'", "'vader-movies'"]),
        ({"data": "opinons.jsonl"}, ["opinons.jsonl: no such file"]),
        ({"data": {"trian": "opinions.jsonl"}}, ["unknown split 'trian'", "'train'"]),
        ({"columns": {"txt": "sentence"}}, ["unknown role 'txt'", "'text'"]),
        ({"training": {"schedule": "cosin"}}, ["training.schedule: ", "'cosine'"]),
        ({"training": {"optimizer": "adamw"}}, ["training.optimizer: ", "'adamw"]),
    ],
)
def test_names_are_looked_up_before_anything_is_loaded(
    recipe: dict[str, Any], change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(PetuneError) as error:
        load_recipe({**recipe, **change}).check(source="my.yaml")
    said = str(error.value)
    assert said.startswith("my.yaml: ")
    assert "\n" not in said
    for word in words:
        assert word in said


def test_a_missing_file_is_named_with_its_neighbour(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(PetuneError, match=r"Did you mean .*opinions\.jsonl\?"):
        load_recipe({**recipe, "data": str(tmp_path / "opinion.jsonl")}).check()


def test_a_caller_with_its_own_method_is_not_asked_for_one(
    recipe: dict[str, Any],
) -> None:
    load_recipe({**recipe, "method": "someone-else's"}).check(method=False)


def test_resolved_paths_are_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    resolved = load_recipe({**recipe, "data": "opinions.jsonl"}).resolved()
    assert resolved.data == str(tmp_path / "opinions.jsonl")
    assert (
        load_recipe({**recipe, "data": "vader-movies", "model": "minilm"})
        .resolved()
        .model
        == "minilm"
    )
    assert isinstance(resolved, Recipe)
