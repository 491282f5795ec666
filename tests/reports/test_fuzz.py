"""Whatever stands in a recipe, in rows or in a run's folder: it works, or ends in one line with exit code 2."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from samples import jsonl, opinions

from petune.cli.app import main
from petune.training.settings import Training

LIMIT = 35.0
"""Seconds for each of the three tests together; what is not tried then is left for the next run."""
SETTINGS = {
    "deadline": None,
    "derandomize": not os.environ.get("PETUNE_FUZZ"),  # else anew at every run
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],
}
TEXT = st.text(max_size=12) | st.sampled_from(
    [
        "",
        " ",
        "007",
        "1e5",
        "NaN",
        "null",
        "~",
        "é",
        "\ufeff",
        "a\nb",
        '"',
        "'",
        "[",
        "{",
        "📎",
        "-1",
        "True",
    ]
)
NUMBERS = (
    st.integers(-3, 40)
    | st.sampled_from([2**31, 2**63, 10**30, -(2**63)])
    | st.floats()
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
    ),
    max_leaves=6,
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {"sentence": TEXT | VALUES, "gold": st.sampled_from(["a", "b"]) | VALUES},
        optional={"text_pair": VALUES, "other": VALUES},
    ),
    max_size=12,
)
KEYS = sorted(Training.model_fields.keys() - {"steps", "epochs", "compile"})
SCHEDULES = [
    "cosine",
    "polynomial",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "greedy",
    "warmup_stable_decay",
]
TRAINING = st.dictionaries(
    st.sampled_from(KEYS),
    SCALARS | st.sampled_from([*SCHEDULES, "sgd", "adafactor", "paged_adamw_8bit"]),
    max_size=4,
)
RECIPES = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(["lora", "prompt-tuning", "ia3", "full"]) | SCALARS,
        "method_args": st.dictionaries(
            st.sampled_from(["rank", "length", "alpha", "x"]), SCALARS, max_size=2
        ),
        "where": SCALARS,
        "head": SCALARS | st.sampled_from(["causal-lm", "token-classification"]),
        "precision": st.sampled_from(["fp32", "nf4", "fp64"]) | SCALARS,
        "columns": st.dictionaries(
            st.sampled_from(["text", "label", "x"]), SCALARS, max_size=3
        ),
        "task": SCALARS,
        "data": SCALARS,
        "training": TRAINING,
        "unknown": VALUES,
    },
)


class Told:
    """Runs commands, and holds that each ends well or in one line.

    Args:
        capsys: what is printed goes there.
    """

    def __init__(self, capsys):
        self.capsys, self.end = capsys, time.monotonic() + LIMIT

    @property
    def late(self) -> bool:
        return time.monotonic() > self.end

    def run(self, *words, context):
        code = main(list(map(str, words)))
        said = self.capsys.readouterr().err.strip()
        diverged = code == 1 and "diverged" in said
        assert code in (0, 2) or diverged, (code, said, context)
        if code:
            last = said.splitlines()[-1]
            assert last.startswith("petune: "), (said, context)
            assert "Traceback" not in said, (said, context)


@pytest.fixture
def told(capsys):
    return Told(capsys)


@pytest.fixture
def trained(recipe, tmp_path):
    """A recipe that is trained in a blink, and a folder for each try."""
    recipe["training"] = {"steps": 2, "batch_size": 4}
    recipe["output"] = str(tmp_path / "out")
    return recipe


def written(folder: Path, values: dict) -> Path:
    """A recipe's file."""
    file = folder / "tried.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return file


def test_rows(told, trained, tmp_path):
    data = tmp_path / "tried.jsonl"
    file = written(tmp_path, {**trained, "data": str(data)})

    @settings(max_examples=60, **SETTINGS)
    @given(rows=ROWS, mangle=st.sampled_from(["", "x", "[" * 50, "\x00", "\n\n"]))
    def tried(rows, mangle):
        if told.late:
            return
        text = "".join(json.dumps(row) + "\n" for row in [*opinions(6), *rows])
        text = (
            text.replace('"sentence": "', f'"sentence": "{mangle}', 1)
            if mangle.isalpha()
            else text + mangle
        )
        data.write_text(text, encoding="utf-8")
        told.run("train", file, "--overwrite", "--quiet", context=text)

    tried()


def test_recipes(told, trained, tmp_path):
    @settings(max_examples=80, **SETTINGS)
    @given(changes=RECIPES)
    def tried(changes):
        if told.late:
            return
        training = {**trained["training"], **changes.pop("training", {}), "steps": 2}
        file = written(tmp_path, {**trained, **changes, "training": training})
        told.run("train", file, "--overwrite", "--quiet", context=(changes, training))

    tried()


def test_run_folders(told, trained, tmp_path):
    assert main(["train", str(written(tmp_path, trained)), "--quiet"]) == 0
    told.capsys.readouterr()
    run, copy = Path(trained["output"]), tmp_path / "copy"
    asked = jsonl(tmp_path / "asked.jsonl", opinions(3))
    json_files = ["adapter/adapter.json", "task.json"]
    names = [*json_files, "adapter/adapter.safetensors", "recipe.yaml"]

    @settings(max_examples=80, **SETTINGS)
    @given(name=st.sampled_from(names), value=VALUES, data=st.data())
    def tried(name, value, data):
        if told.late:
            return
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        file = copy / name
        if name in json_files and data.draw(st.booleans()):
            content = json.loads(file.read_text(encoding="utf-8"))
            content[data.draw(st.sampled_from(sorted(content)))] = value
            file.write_text(json.dumps(content), encoding="utf-8")
        else:
            raw = bytearray(file.read_bytes())
            at = data.draw(st.integers(0, len(raw) - 1))
            raw[at] = data.draw(st.integers(0, 255))
            file.write_bytes(raw[: data.draw(st.sampled_from([at, len(raw)]))])
        told.run(
            "predict", copy, "--data", asked, context=(name, file.read_bytes()[:400])
        )

    tried()
