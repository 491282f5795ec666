"""What a checkpoint holds beside the state of Trainer: the adapter, the method's schedule and the clock, no base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from petune.core.attached.tuning import Tuning
from petune.files import read_json
from petune.training.host import STATE_FILE
from petune.training.result import write_json
from petune.training.run_folder import ADAPTER

PROGRESS = "progress.safetensors"
"""Where a method's schedule stands."""
CLOCK = "clock.json"
"""The seconds so far and the last loss."""


def write_checkpoint(folder: Path, tuning: Any, clock: Mapping[str, float]) -> None:
    """Put a tuning, or a peer's adapter in its place, into a checkpoint's folder."""
    tuning.save(folder / ADAPTER)
    progress = tuning.progress() if isinstance(tuning, Tuning) else {}
    if progress:
        save_file(progress, folder / PROGRESS)
    write_json(folder / CLOCK, dict(clock))


def last_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint and its step; one that a crash cut short lacks its last file."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            step = int(read_json(path / STATE_FILE)["global_step"])
        except (ValueError, KeyError):
            continue  # PetuneError, which read_json raises, is a ValueError
        found.append((step, path))
    if not found:
        return None
    step, newest = max(found)
    return newest, step


def tokens_seen(checkpoint: Path) -> int:
    """How many tokens a run had trained on when the checkpoint was written."""
    return int(read_json(checkpoint / STATE_FILE)["num_input_tokens_seen"])


def resume_schedule(tuning: Tuning, checkpoint: Path) -> None:
    """Put a method's schedule where it stood."""
    saved = checkpoint / PROGRESS
    if saved.exists():
        progress = tuning.progress()
        for key, tensor in load_file(saved).items():
            progress[key].copy_(tensor)
