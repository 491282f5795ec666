"""What a run came to."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from petune.errors import PetuneError
from petune.files import at_home, read_json, write_text


@dataclass(frozen=True)
class Result:
    """The figures of a finished run. Sizes are in bytes, times in seconds."""

    score: float | None
    """The task's main metric on the test split; None where the final evaluation was left out."""
    metric: str
    metrics: dict[str, float]
    """All of the task's metrics on the test split."""
    train_loss: float
    """The mean over the last logging interval."""
    steps: int
    tokens: int
    """Tokens trained on, padding not counted."""
    train_seconds: float
    """In training steps, over all sessions of the run."""
    step_seconds: float
    """The median step, the first two left out."""
    tokens_per_second: float
    peak_memory_bytes: int
    saved_activation_bytes: int
    trainable_params: int
    adapter_bytes: int
    load_seconds: float
    eval_seconds: float
    device: str
    cut_rows: dict[str, dict[str, int]] = field(default_factory=dict)
    """By the use of rows in which some were longer than `training.max_length`: how many `rows` were cut, `of` how many,
    and by how many tokens: `least_tokens`, `most_tokens`. The results of earlier versions don't tell.
    """

    def write(self, run: str | Path) -> None:
        """Into `run/result.json`, the metrics beside the other keys."""
        values = asdict(self)
        write_json(at_home(run) / "result.json", {**values.pop("metrics"), **values})

    @classmethod
    def read(cls, run: str | Path) -> Result:
        """From `run/result.json`.

        Raises:
            PetuneError: the run has no result, or not one of petune's.
        """
        path = at_home(run) / "result.json"
        values = read_json(path)
        own = [field for field in fields(cls) if field.name != "metrics"]
        known = {field.name for field in own}
        needed = {field.name for field in own if field.default_factory is MISSING}
        if missing := needed - values.keys():
            raise PetuneError(f"{path}: no {', '.join(sorted(missing))}.")
        return cls(
            **{key: values[key] for key in known & values.keys()},
            metrics={k: v for k, v in values.items() if k not in known},
        )


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """JSON has no NaN or infinity: null stands for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
