"""The built-in aliases: their readers on a few lines, and the real files where a package index is at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from petune import PetuneError, Source
from petune.training import Dataset
from petune.training.dataset import shuffled
from petune_plugins.catalog import petune_datasets, petune_models, sets


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


class Here:
    """A place whose file is made on the spot."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"Here({self.text!r})"

    def fetch(self, folder: Path) -> None:
        write(folder / "rows.txt", self.text)


@pytest.fixture
def numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path))
    source = Source(
        (Here("\n".join(f"{i % 90}\t{i}" for i in range(100))),), "rows.txt"
    )

    def read(path: Path):
        for line in path.read_text().splitlines():
            text, number = line.split("\t")
            yield {"text": text, "number": int(number)}

    return Dataset("classification", {"text": "text", "label": "number"}, source, read)


def test_ratings_become_the_sign_and_none_is_left_where_there_is_no_sign(tmp_path):
    path = write(
        tmp_path / "r.txt",
        "1\t2.27\tThe Rock is destined.\r\n2\t-0.6\tToo tepid \r\n3\t0\tA film\r\n4\t0.1\tÀ la\r\n",
    )
    assert list(sets.ratings(path)) == [
        {"text": "The Rock is destined.", "label": "positive"},
        {"text": "Too tepid", "label": "negative"},
        {"text": "À la", "label": "positive"},
    ]


def test_a_conll_file_becomes_sentences(tmp_path):
    start = "-DOCSTART- -X- -X- O\n\n"
    text = (
        f"{start}EU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n{start}Peter NNP B-NP B-PER\n"
    )
    assert list(sets.conll(write(tmp_path / "c.conll", text))) == [
        {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"tokens": ["Peter"], "tags": ["B-PER"]},
    ]


def test_documents_and_questions_become_prompts(tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        '{"id": "1", "document": "Rain\\u2028fell.", "summary": "It rained."}\n',
    )
    (row,) = sets.summaries(path)
    assert row["prompt"].startswith("Rain\u2028fell.\n\n")
    assert row["prompt"].endswith("Summary:")
    assert row["completion"] == "It rained."
    path = write(
        tmp_path / "q.jsonl",
        '{"question": "who sings", "answer": ["Meghan Trainor", "Trainor"]}\n',
    )
    (row,) = sets.questions(path)
    assert "who sings?" in row["prompt"]
    assert row["completion"] == "Meghan Trainor"
    assert row["answers"] == ["Meghan Trainor", "Trainor"]


def test_a_split_takes_a_fifth_and_a_tenth_and_shares_no_row(numbers):
    splits = numbers.splits()
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 70,
        "validation": 10,
        "test": 20,
    }
    assert sorted(n for rows in splits.values() for n in rows["number"]) == list(
        range(100)
    )


def test_a_split_is_the_same_everywhere_and_follows_the_seed(numbers):
    assert numbers.splits()["test"]["number"][:5] == [31, 3, 93, 42, 41]
    assert (
        numbers.splits(seed=1)["test"]["number"] != numbers.splits()["test"]["number"]
    )
    rows = numbers.rows()
    assert shuffled(rows, "text") == shuffled(
        sorted(rows, key=lambda row: (row["text"], row["number"])), "text"
    )


def test_equal_inputs_stay_together(numbers):
    order = [row["text"] for row in shuffled(numbers.rows(), "text")]
    assert all(
        order.index(text) + 1 == order.index(text, order.index(text) + 1)
        for text in map(str, range(10))
    )


def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path))
    broken = Dataset(
        "tagging",
        {"tokens": "tokens"},
        Source((Here("no tabs here"),), "rows.txt"),
        sets.ratings,
    )
    with pytest.raises(
        PetuneError,
        match=r"rows.txt: ValueError: not enough values.* Delete .* to fetch it again",
    ):
        broken.rows()


def test_every_data_set_says_which_column_plays_which_role():
    roles = {
        "classification": ["text", "label"],
        "tagging": ["tokens", "tags"],
        "generation": ["prompt", "completion"],
    }
    for name, data in petune_datasets().items():
        assert list(data.columns) == roles[data.task], name
    assert set(petune_models()) == {"smollm2-135m", "minilm"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "share"),
    [
        (
            "vader-movies",
            10_568,
            0.496,
        ),  # 10,605 less the 37 that are rated 0; 49.4 % of all are positive
        ("vader-tweets", 4_196, 0.690),
        ("vader-amazon", 3_610, 0.589),
        ("vader-nyt", 4_946, 0.446),
    ],
)
def test_the_real_sentences(name, count, share):
    rows = petune_datasets()[name].rows()
    assert len(rows) == count
    assert sum(row["label"] == "positive" for row in rows) / count == pytest.approx(
        share, abs=5e-4
    )
    assert all(row["text"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [("conll2003-sample", 226), ("xsum-sample", 1_000), ("nq-sample", 3_569)],
)
def test_the_real_samples(name, count):
    data = petune_datasets()[name]
    rows = data.rows()
    assert len(rows) == count
    assert all(row[column] for row in rows for column in data.columns.values())
    splits = data.splits()
    assert sum(len(part) for part in splits.values()) == count
    assert len(splits["test"]) == count // 5
