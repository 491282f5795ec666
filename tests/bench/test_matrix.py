"""The page of every method on every precision."""

import json

import pytest

from petune.testing import BEHAVIOURS, Row
from petune_bench import matrix


def test_it_runs_what_is_missing_and_writes_the_page(tmp_path, capsys, monkeypatch):
    results, out = tmp_path / "m.jsonl", tmp_path / "matrix.md"
    given = [
        "--families",
        "bert",
        "--precisions",
        "fp32 nf4",
        "--results",
        str(results),
        "--out",
        str(out),
    ]
    refused = [
        Row("a", "bert", "fp32", refused="no layer is wide enough"),
        Row("b", "bert", "fp32", refused="same"),
    ]
    monkeypatch.setattr(matrix, "check", lambda cell, device: (cell, refused, 1.0))
    assert matrix.main(["--methods", "ia3", *given]) == 0
    assert [
        line.split("  ")[:3] for line in capsys.readouterr().out.splitlines()[:2]
    ] == [
        ["1/2", "ia3 bert fp32", "refused"],
        ["2/2", "ia3 bert nf4", "refused"],
    ]
    assert "no layer is wide enough" in out.read_text()

    monkeypatch.setattr(matrix, "check", pytest.fail)
    assert matrix.main(["--methods", "ia3", *given]) == 0
    monkeypatch.setattr(matrix, "source", lambda: "another")
    assert matrix.read(results) == {}, "results of other code don't count"


def test_a_failure_is_shown_and_returned(tmp_path, capsys, monkeypatch):
    rows = [
        Row("a", "llama", "fp32"),
        Row("b", "llama", "fp32", error="AssertionError: no"),
        Row("c", "llama", "fp32"),
    ]
    monkeypatch.setattr(matrix, "check", lambda cell, device: (cell, rows, 1.0))
    options = [
        "--methods",
        "ia3",
        "--families",
        "llama",
        "--precisions",
        "fp32",
        "--results",
        str(tmp_path / "m"),
    ]
    assert matrix.main([*options, "--out", str(tmp_path / "m.md")]) == 1
    assert "ia3 fp32: llama: b: AssertionError: no" in capsys.readouterr().out
    text = (tmp_path / "m.md").read_text()
    assert "| ia3 | ✗ <sup>1</sup> |" in text
    assert "2 checks hold, 0 are refused,\n1 fail" in text


def test_families_fold_and_reasons_are_numbered_once():
    found = {
        (method, family, precision): [
            Row("routing", family, precision, refused=why if family == "t5" else None)
        ]
        for method, why in (("m", "why"), ("n", None))
        for family in ("llama", "t5")
        for precision in ("fp32", "nf4")
    }
    page = matrix.page(found)
    assert "| m | ✓ <sup>1</sup> | ✓ <sup>1</sup> |\n| n | ✓ | ✓ |\n" in page
    assert page.count("\n1. ") == 1
    assert "2. " not in page
    assert '--families "llama t5" --precisions "fp32 nf4"\n' in page, (
        "the page says what it was run on"
    )


def test_arguments_that_are_missing(monkeypatch):
    monkeypatch.setattr(matrix, "ARGUMENTS", {})
    _, rows, _ = matrix.check(("trainable-tokens", "bert", "fp32"))
    assert "needs the argument 'ids'" in rows[0].error


@pytest.mark.slow
def test_several_processes(tmp_path):
    results = tmp_path / "m.jsonl"
    cells = [
        "--methods",
        "ladder-side-tuning",
        "--families",
        "bert",
        "--precisions",
        "fp32",
        "--jobs",
        "2",
    ]
    assert matrix.main([*cells, "--results", str(results)]) == 0
    assert len(json.loads(results.read_text())["rows"]) == len(BEHAVIOURS) - 1, (
        "an encoder does not generate"
    )
