"""Tunings of a model whose parameters FSDP2 (`fully_shard`) has spread over several processes: saving gathers them,
loading scatters them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from petune.core.forward.link import Link
from petune.core.host.parallel import partitioned_by
from petune.errors import PetuneError, UnmergeableError, UnsupportedError


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only, as a `DTensor`."""
    return hasattr(tensor, "full_tensor")


def _spread_parts(model: nn.Module) -> list[Any]:
    """The modules whose parameters `fully_shard` has spread."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None:
        return []
    return [part for part in model.modules() if isinstance(part, kind)]


def at_rest(model: nn.Module) -> None:
    """Let every process hold its part alone. After a forward without a backward some parameters are still whole, and
    what an optimizer or a file gets then would not be what trains.
    """
    for part in _spread_parts(model):
        part.reshard()


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within the context every process has all of a spread model's parameters, so that a method can read them."""
    spread = _spread_parts(model)
    for part in spread:
        part.unshard()
    try:
        yield
    finally:
        at_rest(model)


def mesh_of(parameters: Iterable[Tensor]) -> Any:
    """The processes over which parameters are spread, None if they are not."""
    meshes = (one.device_mesh for one in parameters if is_sharded(one))  # type: ignore[attr-defined]
    return next(meshes, None)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whole. All processes have to call it together."""
    return {
        key: tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        for key, tensor in tensors.items()
    }


def scattered(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, of which this process keeps what it keeps of `like`."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor  # slow to import

    place: Any = like
    value = value.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(value, place.device_mesh, place.placements)


def shard(links: Iterable[Link], mesh: Any) -> None:
    """Spread adapters over the processes over which their model is spread."""
    from torch.distributed.fsdp import fully_shard  # slow to import

    for link in links:
        if any(True for _ in link.adapter.parameters()):
            # a prompt gives its parameter itself, which has to outlast its forward
            freed = link.site.kind != "prompt"
            fully_shard(link.adapter, mesh=mesh, reshard_after_forward=freed)


def check_whole(model: nn.Module) -> None:
    """See that petune can look at a model's weights, whole or spread by FSDP2.

    Raises:
        UnsupportedError: something else has taken them apart.
    """
    by = partitioned_by(model)
    if by is not None:
        raise UnsupportedError(
            f"{by} has taken this model's weights apart: spread it by FSDP2's fully_shard, "
            "or attach before they are."
        )


def check_mergeable(model: nn.Module) -> None:
    """See that weights can be written into a model.

    Raises:
        UnmergeableError: they are spread over processes.
    """
    if _spread_parts(model):
        raise UnmergeableError(
            "fully_shard has spread this model over processes: save the tuning, and merge it in one process."
        )


def write_once(write: Callable[[], None]) -> None:
    """Let one process of all that have gathered a tuning write it. The others are back when it has, and fail as
    it does.

    Raises:
        PetuneError: it could not be written.
    """
    from torch import distributed  # slow to import

    failed: list[str | None] = [None]
    if distributed.get_rank() == 0:
        try:
            write()
        except (PetuneError, OSError) as error:
            failed = [str(error)]
    distributed.broadcast_object_list(failed)
    if failed[0] is not None:
        raise PetuneError(failed[0])
