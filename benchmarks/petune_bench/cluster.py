"""Cells on a ray cluster. Each has its node's processors (or one GPU) to itself, so that its timing is its own.

The output folder and single-file plugins must be on a file system that the nodes share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from petune.errors import PetuneError
from petune_bench.cell import Cell, Row, measure


def run(
    cells: Iterable[Cell], started: Callable[[Cell], None], step: Callable[[int], None]
) -> Iterator[Row]:
    """The rows, in the order in which they are done.

    Raises:
        PetuneError: ray is not installed.
    """
    ray = load()
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    # max_calls=1: a fresh process for each cell. max_retries=0: a crash is a result
    task: Any = ray.remote(max_calls=1, max_retries=0, **_share(ray))(measure)
    waiting = {task.remote(cell): cell for cell in cells}
    for cell in waiting.values():
        started(cell)
    while waiting:
        (done, *_), _ = ray.wait(list(waiting))
        cell = waiting.pop(done)
        try:
            yield ray.get(done)
        except ray.exceptions.OutOfMemoryError as error:
            yield cell.row("oom", str(error))
        except ray.exceptions.RayError as error:
            yield cell.row("failed", str(error))


def load() -> Any:
    """The package, which petune does not require.

    Raises:
        PetuneError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise PetuneError(
            "--executor ray: ray is not installed; run `pip install ray`."
        ) from None
    return ray


def _share(ray: Any) -> dict[str, float]:
    """A whole GPU, with its part of the processors, or a whole node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = [node for node in nodes if node.get("GPU")]
    if gpus:
        return {
            "num_gpus": 1,
            "num_cpus": min(
                max(1, int(node.get("CPU", 1) // node["GPU"])) for node in gpus
            ),
        }
    return {"num_cpus": min(int(node["CPU"]) for node in nodes if node.get("CPU"))}
