"""What two processes do together for test_processes.py: `torchrun --nproc-per-node 2 processes.py WHAT FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import petune
from petune.testing import tiny_batch, tiny_model

METHODS = ("lora", "prefix-tuning", "prompt-tuning", "houlsby")
BATCH = tiny_batch("llama")


def spread(model: Any) -> Any:
    """FSDP2 as users apply it: every block, then the model."""
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


def steps(model: Any, tuning: petune.Tuning, count: int = 2) -> list[float]:
    """The losses of some steps of training."""
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    losses = []
    for _ in range(count):
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(**BATCH).logits
    return found


def sharded(folder: Path) -> dict[str, Any]:
    """Train, save and load under `fully_shard`, each beside the same in one process."""
    found: dict[str, Any] = {}
    for method in METHODS:
        path = folder / method
        torch.manual_seed(0)
        whole = tiny_model("llama")
        want = steps(whole, petune.attach(whole, method))
        torch.manual_seed(0)
        model = tiny_model("llama")
        tuning = petune.attach(model, method)
        losses = steps(spread(model), tuning)
        tuning.save(path)
        loaded = spread(tiny_model("llama"))
        loaded(**BATCH)  # a model that has run already
        again = petune.load(loaded, path)
        found[method] = {
            "loss": _apart(losses, want),
            "saved": float((logits(_whole(path)) - logits(whole)).abs().max()),
            "loaded": float((logits(loaded) - logits(whole)).abs().max()),
            "spread": all(hasattr(p, "full_tensor") for p in again.parameters()),
            "trained on": _apart(steps(loaded, again), _on(path)),
            "merge": _refusal(tuning),
        }
        again.save(folder / f"{method}-again")
    return found


def _whole(path: Path) -> nn.Module:
    model = tiny_model("llama")
    petune.load(model, path)
    return model


def _on(path: Path) -> list[float]:
    model = tiny_model("llama")
    return steps(model, petune.load(model, path))


def _apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _refusal(tuning: petune.Tuning) -> str:
    try:
        tuning.merge()
    except petune.PetuneError as error:
        return str(error)
    return ""


def trained(folder: Path) -> dict[str, Any]:
    """Every recipe of a folder; what the runs hold is compared outside."""
    from petune.training.loop import train

    return {
        file.stem: train(yaml.safe_load(file.read_text()), quiet=True).steps
        for file in sorted(folder.glob("*.yaml"))
    }


def main() -> None:
    torch.set_num_threads(1)
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "sharded":
        distributed.init_process_group("gloo")
        found = sharded(folder)
    else:
        found = trained(folder)
    if distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
