"""Values in data: understood as a person means them, or one line that names file, column, row and remedy."""

import csv
import gzip
import json
import random
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset
from pyarrow import parquet
from samples import changed, jsonl, questions

from petune import PetuneError
from petune.cli import main
from petune.training import (
    Result,
    as_label,
    as_text,
    as_texts,
    load_recipe,
    predict,
    train,
)
from petune.training.data import assign, load_splits
from petune.training.rows import read_rows
from petune.training.setup import make_task

TEXT = {"a": as_text}


def cells(path: Path, content: str | bytes) -> list[tuple[Any, ...]]:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(raw)
    return [tuple(row.values()) for row in read_rows(path)]


def column(path: Path, values: list[Any], read: Any = as_text) -> list[Any]:
    """What a role makes of a column of JSON."""
    data = jsonl(path, [{"a": value} for value in values])
    return assign(read_rows(data), {}, ["a"], reads={"a": read})["a"][:]


@pytest.mark.parametrize(
    ("values", "read", "understood"),
    [
        ([1, "x", 2.5, True], as_text, ["1", "x", "2.5", "true"]),
        (["[1, 2]", "7", "2024-01-31"], as_text, ["[1, 2]", "7", "2024-01-31"]),
        ([2**70], as_text, [str(2**70)]),
        (["x", ["y", 2]], as_texts, [["x"], ["y", "2"]]),
        (["x", 3], as_texts, ["x", "3"]),
        (["007", "7"], as_label, ["007", "7"]),
        ([7, "007", "7"], as_label, ["7", "007", "7"]),
        ([1, 2.0], as_label, [1, 2]),
        ([False, True], as_label, [False, True]),
        ([2**70, 1], as_label, [str(2**70), "1"]),
    ],
)
def test_what_a_person_means(
    tmp_path: Path, values: list[Any], read: Any, understood: list[Any]
) -> None:
    found = column(tmp_path / "d.jsonl", values, read)
    assert found == understood
    assert list(map(type, found)) == list(map(type, understood))


@pytest.mark.parametrize(
    ("value", "read", "said"),
    [
        ({"name": "Ann"}, as_text, r"an object \(\{'name': 'Ann'\}\), not a text"),
        ([{"role": "user", "content": "hi"}], as_text, "Chat messages are not read"),
        (["x", "y"], as_text, r"a list \(\['x', 'y'\]\), not a text"),
        ({"text": ["x"], "answer_start": [3]}, as_texts, "the list under its key 'text'"),
        ([], as_texts, "an empty list"),
        ([["x"]], as_texts, "not of texts"),
        ([None], as_texts, "not of texts"),
        ("\ud83d", as_text, "half a character"),
        (["x", "y"], as_label, r"several labels a row \(multi-label\)"),
        ({"x": 1}, as_label, "an object .* not a label"),
        (0.5, as_label, r"fractions such as 0\.5"),
        (" ", as_label, "' ', no label"),
        ("NaN", as_label, "'NaN', no label"),
    ],
)  # fmt: skip
def test_what_nobody_can_mean(tmp_path: Path, value: Any, read: Any, said: str) -> None:
    with pytest.raises(PetuneError, match=rf"column 'a', row 2: .*{said}") as error:
        column(tmp_path / "d.jsonl", ["x", value], read)
    assert str(error.value).startswith(f"{tmp_path / 'd.jsonl'}: ")
    assert "\n" not in str(error.value)


def test_numbers_keep_their_spelling(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    digits = "7" * 5000
    spelled = ["1.10", "1e5", digits, "0.5", "-0.0", "Infinity", "12345678901234567890"]
    path.write_text("".join(f'{{"a": {number}}}\n' for number in spelled))
    assert assign(read_rows(path), {}, ["a"], reads=TEXT)["a"][:] == spelled
    table = "a,b,c,d\n007,1.50,1,1.0\n8,2.5,2,nan\n"
    assert cells(tmp_path / "d.csv", table) == [
        ("007", "1.50", 1, 1.0),
        ("8", "2.5", 2, None),
    ]


def test_holes_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": 1}\n\n{"b": 1}\n{"a": NaN}\n{"a": null}\n')
    with pytest.raises(
        PetuneError, match=r"column 'a' is empty in 3 rows; row 2 \(line 3\) is"
    ):
        assign(read_rows(path), {}, ["a"], reads=TEXT)


def test_an_empty_text_is_taken_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert cells(tmp_path / "d.csv", "a,b\n1,\nx,2\n,3\n")[2] == ("", 3)
    read = assign(read_rows(tmp_path / "d.csv"), {}, ["a"], reads=TEXT)
    assert read["a"][:] == ["1", "x", ""]
    assert len(caplog.messages) == 1
    assert "'a' is an empty text in 1 of 3 rows; row 3 (line 4)" in caplog.messages[0]


def test_columns_that_play_no_role_may_hold_anything(tmp_path: Path) -> None:
    rows = [{"a": "x", "z": 1}, {"a": "y", "z": "1"}, {"a": "z", "z": {"k": [1]}}]
    assert list(read_rows(jsonl(tmp_path / "d.jsonl", rows))) == rows


def test_typed_columns_of_parquet(tmp_path: Path) -> None:
    columns = {
        "day": [date(2024, 1, 31)],
        "time": [datetime(2024, 1, 31, 12, 30)],
        "price": [Decimal("1.10")],
        "bytes": ["é".encode()],
        "kind": pyarrow.array(["x"]).dictionary_encode(),
        "small": pyarrow.array([3], pyarrow.uint8()),
    }
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    read = assign(read_rows(path), {}, columns, reads=dict.fromkeys(columns, as_text))
    assert read[0] == {
        "day": "2024-01-31",
        "time": "2024-01-31 12:30:00",
        "price": "1.10",
        "bytes": "é",
        "kind": "x",
        "small": "3",
    }
    parquet.write_table(pyarrow.table({"a": [["x"]]}), path)
    with pytest.raises(PetuneError, match=r"column 'a', row 1: a list"):
        assign(read_rows(path), {}, ["a"], reads=TEXT)


REPORTED = [('"Great, he said', 1), ("I left early", 0), ('"Never again', 0), ("fine", 1)]  # fmt: skip


def test_a_stray_quote_swallows_no_rows(tmp_path: Path) -> None:
    lines = [f"{text}\t{label}\n" for text, label in REPORTED]
    assert cells(tmp_path / "d.tsv", "text\tlabel\n" + "".join(lines)) == REPORTED
    commas = "text;label\n" + "".join(lines).replace("\t", ";")
    assert cells(tmp_path / "d.csv", commas) == REPORTED
    # a quote closes at the end of a cell, some rows further down
    table = 'text\tlabel\n"Hello\t1\nhe said "\t0\n5" disk\t1\n"\t0\n'
    found = cells(tmp_path / "d.tsv", table)
    assert found == [('"Hello', 1), ('he said "', 0), ('5" disk', 1), ('"', 0)]


def test_quotes_that_enclose_a_cell_come_off(tmp_path: Path) -> None:
    table = 'label\ttext\n0\t"one\ntwo"\n1\t"say ""hi"""\n0\t"a\tb"\n'
    expected = [(0, "one\ntwo"), (1, 'say "hi"'), (0, "a\tb")]
    assert cells(tmp_path / "d.tsv", table) == expected
    table = 'text,label\r\n"Dear Sir, thanks\r\nbye",1\r\n\r\n"",0\r\n'
    expected = [("Dear Sir, thanks\nbye", 1), ("", 0)]
    assert cells(tmp_path / "d.csv", table) == expected


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, ends: str) -> None:
    table = ends.join(["text,label", "café,1", "thé,0", ""])
    found = cells(tmp_path / "d.csv", table.encode(encoding))
    assert found == [("café", 1), ("thé", 0)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.csv", "text\ncafé\n".encode("latin-1"), r"d\.csv line 2: byte 0xe9 is not UTF-8.*iconv"),
        ("d.csv", gzip.compress(b"text\na\n"), r"d\.csv: is a gzip archive, no text; unpack it"),
        ("d.tsv", b"PK\x03\x04rest", r"d\.tsv: is a zip archive or a spreadsheet, no text"),
        ("d.jsonl", b"\x28\xb5\x2f\xfdrest", r"d\.jsonl: is a zstd archive"),
        ("d.jsonl", '{"a": "é"}'.encode("latin-1"), r"d\.jsonl line 1: byte 0xe9 is not UTF-8"),
        ("d.csv", b"text\nwell\nx\0y\n", r"d\.csv line 3: a NUL character"),
        ("d.csv", b"text,label\n\na,b,c\n", r"d\.csv: line 3 has 3 cells between commas, the header 2"),
        ("d.tsv", b"text\tlabel\na\n", r"d\.tsv: line 2 has 1 cell between tabs, the header 2"),
        ("d.csv", b"text,label,text\n", r"d\.csv line 1: two columns are called 'text'"),
        ("d.csv", b"text,label\n", "no rows"),
        ("d.csv", b"", "no rows"),
        ("d.json", b"\xef\xbb\xbf", "no rows"),
        ("d.json", b"[]", "no rows"),
        ("d.json", b'[{"a": 1},\n{"a": 2}', r"d\.json line 2: no ',' or '\]'"),
        ("d.json", b'[{"a": 1},\n2]', r"d\.json line 2: each row is an object"),
        ("d.jsonl", b'{"a": 1, "a": 2}', r"d\.jsonl line 1: the key 'a' is given twice"),
        ("d.jsonl", b'{"a": 1} {"a": 2}', r"d\.jsonl line 1: more than one value"),
        ("d.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", r"d\.jsonl line 2: brackets"),
        ("d.json", b'[{"a": 1},\n{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}]", r"d\.json line 2: brackets"),
        ("d.json", b"[" * 10_000, r"d\.json line 1: brackets"),
    ],
)  # fmt: skip
def test_files_that_are_not_what_they_say(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    with pytest.raises(PetuneError, match=said) as error:
        cells(tmp_path / name, content)
    assert "\n" not in str(error.value)


def test_either_kind_of_json_under_either_ending(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": 2}]
    as_list, as_lines = json.dumps(rows, indent=1), '{"a": 1}\n{"a": 2}\n'
    for name in ("d.json", "d.jsonl"):
        for content in (as_list, as_lines):
            assert cells(tmp_path / name, content) == [(1,), (2,)]


def test_quotes_after_a_backslash(tmp_path: Path) -> None:
    table = r"""text,label
"He said \"hi\", then \\o/",1
"C:\",0
"\"x\"",1
a\b,0
"""
    expected = [('He said "hi", then \\o/', 1), ("C:\\", 0), ('"x"', 1), ("a\\b", 0)]
    assert cells(tmp_path / "d.csv", table) == expected


def test_what_spreadsheets_leave(tmp_path: Path) -> None:
    expected = [("a, b", 1), ("c", 0)]
    for table in (
        "text;label\na, b;1\nc;0\n",
        'text,label,,\n"a, b",1,,\n,,,\nc,0,,\n',
    ):
        assert cells(tmp_path / "d.csv", table) == expected


def test_a_cell_of_megabytes(tmp_path: Path) -> None:
    long = "x" * 3_000_000
    found = cells(tmp_path / "d.csv", f'text,label\n{long},1\n"{long}, ""y""",0\n')
    assert found == [(long, 1), (f'{long}, "y"', 0)]


def test_an_optional_role_is_every_splits_or_none(tmp_path: Path) -> None:
    row = {"text": "x", "label": 0}
    train = jsonl(tmp_path / "train.jsonl", [{**row, "text_pair": "y"}] * 20)
    test = jsonl(tmp_path / "test.jsonl", [row] * 3)
    data = {"train": str(train), "test": str(test)}
    with pytest.raises(PetuneError, match=r"test\.jsonl: unknown column 'text_pair'"):
        load_splits(data, {}, ("text", "label"), ("text_pair",))


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = main(argv)
    return code, capsys.readouterr().err.splitlines()


def test_labels_keep_their_spelling_from_file_to_answer(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "d.csv"
    data.write_text("sentence,gold\n" + "good,007\nbad,7\n" * 20)
    steps = {"steps": 20, "learning_rate": 3e-2}
    train(changed({**recipe, "data": str(data)}, **steps), quiet=True)
    task = json.loads((Path(recipe["output"]) / "task.json").read_text())
    assert task["labels"] == ["007", "7"]
    answers = predict(recipe["output"], [{"sentence": "good"}, {"sentence": "bad"}])
    assert [row["prediction"] for row in answers] == ["007", "7"]
    rows = [{"sentence": "good", "gold": "007"}, {"sentence": "bad", "gold": 7}]
    scored = jsonl(tmp_path / "scored.jsonl", rows)
    assert main(["eval", recipe["output"], "--data", str(scored), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0
    jsonl(scored, [*rows, {"sentence": "bad", "gold": "meh"}])
    code, lines = said(capsys, "eval", recipe["output"], "--data", str(scored))
    assert code == 0
    assert len(lines) == 1
    assert "1 of 3 scored rows have a label, such as 'meh'" in lines[0]
    pairs = jsonl(tmp_path / "pairs.jsonl", [{**rows[0], "text_pair": "x"}])
    code, lines = said(capsys, "eval", recipe["output"], "--data", str(pairs))
    assert code == 0
    assert "column 'text_pair' is read, though the training rows had none" in lines[0]


def test_a_run_on_pairs_is_asked_for_pairs(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"sentence": "good", "text_pair": "bad"}
    data = jsonl(tmp_path / "d.jsonl", [{**row, "gold": i % 2} for i in range(20)])
    train({**recipe, "data": str(data)}, quiet=True)
    assert len(predict(recipe["output"], [row])) == 1
    single = jsonl(tmp_path / "single.jsonl", [{"sentence": "good"}])
    code, lines = said(capsys, "predict", recipe["output"], "--data", str(single))
    assert code == 2
    assert "no column 'text_pair', and the training rows were pairs" in lines[0]


def generation_task(generation: dict[str, Any], most: int) -> Any:
    return make_task(load_recipe(changed(generation, max_length=most)))


@pytest.mark.parametrize(
    ("prompt", "completion", "most", "kept"),
    [
        (2, 10, 16, (2, 10)),  # it fits
        (2, 13, 16, (2, 13)),  # to the last token
        (2, 20, 16, (2, 13)),  # the completion is cut
        (20, 4, 16, (11, 4)),  # the prompt is
        (20, 20, 16, (8, 7)),  # half and half
    ],
)
def test_a_completion_is_cut_only_where_the_row_is_too_long(
    generation: dict[str, Any], prompt: int, completion: int, most: int, kept: Any
) -> None:
    task = generation_task(generation, most)
    row = {"prompt": "one " * prompt, "completion": "good " * completion}
    ids = task.encode(row)["input_ids"]
    words = task.tokenizer.convert_ids_to_tokens(ids)
    assert words == ["one"] * kept[0] + ["good"] * kept[1] + ["</s>"]
    lost = prompt + completion - sum(kept)
    assert task.cuts.lost == ([lost] if lost else [])


def test_a_run_says_how_many_rows_were_cut_and_by_how_much(
    generation: dict[str, Any],
    recipe: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = generation_task(generation, 8)
    rows = [{"prompt": "one", "completion": "good " * n} for n in (3, 6, 7, 20)]
    task.encoded(Dataset.from_list(rows), "training")
    assert caplog.messages == [
        "training: 2 of 4 rows are longer than training.max_length=8 and were cut, by 1 to 14 tokens."
    ]
    caplog.clear()
    train(changed(recipe, max_length=6), quiet=True)
    result = json.loads((Path(recipe["output"]) / "result.json").read_text())
    cuts = result["cut_rows"]
    assert list(cuts) == ["training", "answers"]
    for line, (use, cut) in zip(caplog.messages, cuts.items(), strict=True):
        assert line == (
            f"{use}: {cut['rows']} of {cut['of']} rows are longer than training.max_length=6 and were cut, "
            f"by {cut['least_tokens']} to {cut['most_tokens']} tokens."
        )


def test_a_run_that_cuts_nothing_says_so_in_its_result(
    generation: dict[str, Any],
) -> None:
    assert train(generation, quiet=True).cut_rows == {}
    file = Path(generation["output"]) / "result.json"
    values = json.loads(file.read_text())
    assert values.pop("cut_rows") == {}
    file.write_text(json.dumps(values))  # as earlier versions wrote it
    assert Result.read(file.parent).cut_rows == {}
    task = generation_task(generation, 8)
    for words, kept in (("good " * 20, {"held-out loss"}), ("one", set())):
        rows = [{"prompt": "one", "completion": words}]
        task.encoded(Dataset.from_list(rows), "held-out loss")
        assert task.cuts.by_use.keys() == kept


def test_a_prompt_without_a_token_is_answered(generation: dict[str, Any]) -> None:
    train(generation, quiet=True)
    assert len(predict(generation["output"], [{"ask": ""}, {"ask": "one"}])) == 2


def test_every_row_of_a_file_is_scored_or_how_many_is_said(
    generation: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from petune_plugins.tasks.generation import Generation

    train(generation, quiet=True)
    scored: list[int] = []
    figures = {"chrf": 0.5}
    monkeypatch.setattr(
        Generation, "score", lambda _, model, rows: scored.append(len(rows)) or figures
    )
    data = jsonl(tmp_path / "more.jsonl", questions(300))
    run = generation["output"]
    assert said(capsys, "eval", run, "--data", str(data)) == (0, [])
    assert scored == [300]
    file = Path(run) / "recipe.yaml"
    file.write_text(file.read_text().replace("eval_rows: null", "eval_rows: 50"))
    code, lines = said(capsys, "eval", run, "--data", str(data))
    assert (code, scored[1]) == (0, 50)
    assert len(lines) == 1
    assert "more.jsonl: 50 of 300 rows are scored" in lines[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"ask": "x", "reply": {"name": "Ann"}}, ["'reply', row 1: an object"]),
        ({"ask": [{"role": "user", "content": "x"}], "reply": "y"}, ["'ask', row 1: a list", "Chat messages"]),
        ({"ask": "x", "reply": []}, ["'reply', row 1: an empty list"]),
        ({"ask": "x"}, ["unknown column 'reply'"]),
    ],
)  # fmt: skip
def test_training_refuses_in_one_line_and_leaves_nothing(
    generation: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    row: dict[str, Any],
    words: list[str],
) -> None:
    data = jsonl(tmp_path / "bad.jsonl", [row] * 20)
    file = tmp_path / "bad.yaml"
    file.write_text(json.dumps({**generation, "data": str(data)}))
    code, lines = said(capsys, "train", str(file))
    assert code == 2
    assert len(lines) == 1
    for word in ["bad.jsonl", *words]:
        assert word in lines[0]
    assert not list(Path(generation["output"]).glob("*"))


def test_numbers_are_trained_on_and_answered(
    generation: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"ask": i, "reply": i + 1, "id": i or "none"} for i in range(20)]
    data = jsonl(tmp_path / "sums.jsonl", rows)
    train({**generation, "data": str(data)}, quiet=True)
    assert main(["predict", generation["output"], "--data", str(data), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{k: row[k] for k in ("ask", "reply", "id")} for row in found] == rows


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_pythons_csv_writes(tmp_path: Path, quoting: Any) -> None:
    pick, path = random.Random(0), tmp_path / "d.csv"
    letters = 'ab",;\t\n\\ '
    rows = [
        tuple("x" + "".join(pick.choices(letters, k=6)) for _ in range(3))
        for _ in range(300)
    ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, quoting=quoting, lineterminator="\n")
        writer.writerows([("a", "b", "c"), *rows])
    assert [tuple(row.values()) for row in read_rows(path)] == rows


def test_labels_that_differ_in_spaces_are_pointed_out(
    recipe: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    task = make_task(load_recipe(recipe))
    labels = ["pos", "neg", "pos "]
    task.fit(Dataset.from_dict({"text": labels, "label": labels}))
    assert task.labels == ["neg", "pos", "pos "]
    assert len(caplog.messages) == 1
    assert "column 'gold': some labels differ in spaces" in caplog.messages[0]
