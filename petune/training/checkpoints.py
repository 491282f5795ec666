"""What a checkpoint holds beside the state of Trainer: the adapter, the method's schedule and the clock, no base."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from petune.core.attached.saved import read_tensors
from petune.core.attached.tuning import Tuning
from petune.errors import PetuneError
from petune.files import read_json
from petune.training.host import OPTIMIZER_FILES, RANDOM_FILES, STATE_FILE
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
        except (ValueError, KeyError, TypeError):
            continue  # PetuneError, which read_json raises, is a ValueError
        found.append((step, path))
    if not found:
        return None
    step, newest = max(found)
    return newest, step


def check_whole(checkpoint: Path) -> None:
    """See that all is there and can be read without which a training would go on otherwise, and say nothing.

    Raises:
        PetuneError: something is not; the message names the file.
    """
    remedy = way_out(checkpoint)
    random = sorted(checkpoint.glob(RANDOM_FILES)) or [checkpoint / "rng_state.pth"]
    states = [checkpoint / name for name in OPTIMIZER_FILES]
    for path in (*states, *random):
        if not path.is_file():
            raise PetuneError(f"{path}: no such file; {remedy}.")
        try:
            whole = zipfile.is_zipfile(path)
            if path in states:
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # what a damaged pickle raises is anything
            whole = False
        if not whole:
            raise PetuneError(f"{path}: is damaged; {remedy}.")


def way_out(checkpoint: Path) -> str:
    """What can be done where a checkpoint is of no use."""
    others = set(checkpoint.parent.glob("checkpoint-*")) - {checkpoint}
    if others:
        return f"delete {checkpoint} to go on from the one before, or --overwrite"
    return "--overwrite begins anew"


def tokens_seen(checkpoint: Path) -> int:
    """How many tokens a run had trained on when the checkpoint was written."""
    return int(read_json(checkpoint / STATE_FILE)["num_input_tokens_seen"])


def steps_planned(checkpoint: Path) -> int:
    """How many steps the training was to have when the checkpoint was written."""
    return int(read_json(checkpoint / STATE_FILE)["max_steps"])


def resume_schedule(tuning: Tuning, checkpoint: Path) -> None:
    """Put a method's schedule where it stood.

    Raises:
        PetuneError: what the checkpoint says of it is damaged, or of another method.
    """
    saved = checkpoint / PROGRESS
    if not saved.exists():
        return
    progress = tuning.progress()
    found = read_tensors(saved)
    if found.keys() != progress.keys():
        raise PetuneError(f"{saved}: is of another method than the tuning.")
    for key, tensor in found.items():
        progress[key].copy_(tensor)
