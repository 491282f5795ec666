import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from petune import PetuneError
from petune.training.data import assign, load_splits
from petune.training.rows import read_rows

ROWS = [{"id": i, "sentence": f"text {i}", "gold": i % 2} for i in range(30)]


def save(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    table = Dataset.from_list(rows)
    match path.suffix:
        case ".jsonl":
            table.to_json(path)
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            table.to_csv(path, index=False)
        case ".tsv":
            table.to_csv(path, index=False, sep="\t")
        case ".parquet":
            table.to_parquet(path)
    return path


COLUMNS = {"text": "sentence", "label": "gold"}
ROLES = ("text", "label")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file(tmp_path: Path, ending: str) -> None:
    assert list(read_rows(save(tmp_path / f"rows{ending}"))) == ROWS


def test_a_single_file_is_split_once_and_for_all(tmp_path: Path) -> None:
    path = str(save(tmp_path / "rows.jsonl"))
    splits, again = load_splits(path, COLUMNS, ROLES), load_splits(path, COLUMNS, ROLES)
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 24,
        "validation": 3,
        "test": 3,
    }
    assert [list(rows) for rows in splits.values()] == [
        list(rows) for rows in again.values()
    ]
    texts = Counter(text for rows in splits.values() for text in rows["text"])
    assert texts == Counter(row["sentence"] for row in ROWS)
    assert splits["train"].column_names == ["text", "label"]


def test_a_folder_and_a_mapping_bring_their_own_splits(tmp_path: Path) -> None:
    save(tmp_path / "train.jsonl", ROWS[:20])
    save(tmp_path / "dev.csv", ROWS[20:25])
    save(tmp_path / "test.parquet", ROWS[25:])
    save(tmp_path / "notes.jsonl", ROWS)
    expected = {"train": ROWS[:20], "validation": ROWS[20:25], "test": ROWS[25:]}
    named = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "dev.csv"),
             "test": str(tmp_path / "test.parquet")}  # fmt: skip
    for source in (str(tmp_path), named):
        splits = load_splits(source, COLUMNS, ROLES)
        assert {split: rows["text"][:] for split, rows in splits.items()} == {
            split: [row["sentence"] for row in rows] for split, rows in expected.items()
        }


def test_only_the_missing_split_is_cut_from_train(tmp_path: Path) -> None:
    files = {
        "train": str(save(tmp_path / "a.jsonl", ROWS[:20])),
        "test": str(save(tmp_path / "b.jsonl", ROWS[20:])),
    }
    splits = load_splits(files, COLUMNS, ROLES)
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [
        18,
        2,
        10,
    ]


def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.jsonl")
    with pytest.raises(PetuneError) as error:
        load_splits(str(path), {"text": "sentense", "label": "gold"}, ROLES)
    said = str(error.value)
    assert str(path) in said
    assert "'sentense'" in said
    assert "Did you mean 'sentence'?" in said
    assert "gold, id, sentence" in said
    with pytest.raises(PetuneError, match=r"columns: \{text: …\}"):
        load_splits(str(path), {}, ROLES)


def test_optional_roles_and_swapped_names() -> None:
    rows = Dataset.from_list([{"a": "x", "b": "y", "text_pair": "z"}])
    assert assign(
        rows, {"text": "a"}, ["text"], ["text_pair"], source="s"
    ).column_names == [
        "text",
        "text_pair",
    ]
    assert assign(rows, {"a": "b", "b": "a"}, ["a", "b"], source="s")[0] == {
        "a": "y",
        "b": "x",
    }
    with pytest.raises(PetuneError, match="can't play two roles"):
        assign(rows, {"text": "a", "label": "a"}, ["text", "label"], source="s")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", '{"a": 1}\n{"a": \n', r"rows\.jsonl line 2: "),
        (
            "rows.jsonl",
            '{"a": 1}\n[1]\n',
            r"rows\.jsonl line 2: each line is an object",
        ),
        ("rows.jsonl", "", r"rows\.jsonl: no rows"),
        ("rows.json", '{"a": 1}', r"rows\.json: a \.json file is a list of objects"),
        ("rows.csv", "a,b\n1,2\n3\n", r"rows\.csv: .*"),
        ("rows.parquet", "no parquet", r"rows\.parquet: "),
        ("rows.pkl", "x", r"unknown kind of file '\.pkl'"),
    ],
)
def test_a_file_that_is_not_what_it_says(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PetuneError, match=said) as error:
        read_rows(tmp_path / name)
    assert "\n" not in str(error.value)


def test_empty_values_and_too_few_rows(tmp_path: Path) -> None:
    path = save(
        tmp_path / "rows.jsonl", [*ROWS, {"id": 31, "sentence": None, "gold": 1}]
    )
    with pytest.raises(
        PetuneError, match="column 'sentence' is empty in 1 rows; row 31 is the first"
    ):
        assign(read_rows(path), COLUMNS, ROLES, source="s")
    with pytest.raises(PetuneError, match="2 rows are too few"):
        load_splits(str(save(tmp_path / "few.jsonl", ROWS[:2])), COLUMNS, ROLES)


def test_a_hub_set_that_can_not_be_had_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(PetuneError, match="data owner/name: no network"):
        load_splits("owner/name", COLUMNS, ROLES)


def test_a_hub_set_is_read_by_its_splits_and_label_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    files = {
        "train": str(save(tmp_path / "a.jsonl", ROWS)),
        "dev": str(save(tmp_path / "b.jsonl", ROWS[:5])),
    }
    features = datasets.Features(id=datasets.Value("int64"), sentence=datasets.Value("string"),
                                 gold=datasets.ClassLabel(names=["no", "yes"]))  # fmt: skip
    real = datasets.load_dataset_builder

    def local(name: str, config: str | None) -> Any:
        assert (name, config) == ("owner/name", "small")
        return real(
            "json",
            data_files=files,
            features=features,
            cache_dir=str(tmp_path / "cache"),
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", local)
    splits = load_splits(
        {"hub": "owner/name", "config": "small", "train": "train", "test": "dev"},
        COLUMNS,
        ROLES,
    )
    assert splits["test"]["label"][:] == ["no", "yes", "no", "yes", "no"]
    assert len(splits["train"]) + len(splits["validation"]) == len(ROWS)
    with pytest.raises(PetuneError, match="unknown split 'tset'"):
        load_splits(
            {"hub": "owner/name", "config": "small", "test": "tset"}, COLUMNS, ROLES
        )


def test_a_hub_set_that_would_be_unpickled_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    real = datasets.load_dataset_builder
    path = tmp_path / "x.pkl"
    path.write_bytes(b"")
    monkeypatch.setattr(
        datasets, "load_dataset_builder",
        lambda *_: real("pandas", data_files=str(path), cache_dir=str(tmp_path / "cache")),
    )  # fmt: skip
    with pytest.raises(PetuneError, match="its files are 'pandas'"):
        load_splits("owner/name", COLUMNS, ROLES)
