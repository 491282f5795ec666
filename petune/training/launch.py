"""What a launcher tells a process by variables of the environment, seen to before anything believes it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from petune.errors import PetuneError, UnsupportedError

LEAST = {
    "WORLD_SIZE": 1,
    "RANK": 0,
    "LOCAL_RANK": -1,  # how some launchers say that there is one process
    "LOCAL_WORLD_SIZE": 1,
    "MASTER_PORT": 1,
}
"""The variables that are whole numbers, and the least that each can be."""
LAST_PORT = 65535
MEETING = ("LOCAL_RANK", "RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a process must be told besides how many there are."""
OUT_OF = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE"}
"""The ranks, and what each counts up to."""
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""What `accelerate launch` may ask for."""
SWITCHES = (*UNSUPPORTED, "ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE")
PRECISIONS = ("no", "fp16", "bf16", "fp8")
"""What ACCELERATE_MIXED_PRECISION can be."""
YES, NO = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")
REMEDY = "start petune by torchrun, or unset it"


def started() -> int:
    """How many processes a launcher has started, 1 without one.

    Raises:
        UnsupportedError: the launcher was asked for more than equal processes that each hold the model.
        PetuneError: a variable is not what it should be, or one is missing by which the processes find each other.
    """
    for variable in SWITCHES:
        if _is_on(variable) and variable in UNSUPPORTED:
            raise UnsupportedError(
                f"`petune train` does not run under {UNSUPPORTED[variable]}: start it by "
                "`torchrun --nproc-per-node N -m petune.cli train RECIPE.yaml`."
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    if precision not in PRECISIONS:
        raise PetuneError(
            f"ACCELERATE_MIXED_PRECISION={precision}: should be {' or '.join(PRECISIONS)}; unset it."
        )
    numbers = {name: _number(name) for name in LEAST if os.environ.get(name)}
    count = numbers.get("WORLD_SIZE", 1)
    if count > 1:
        _check_meeting(numbers, count)
    return count


def _is_on(variable: str) -> bool:
    said = os.environ.get(variable, "").lower()
    if said and said not in (*YES, *NO):
        raise PetuneError(f"{variable}={said}: should be true or false; unset it.")
    return said in YES


def _number(variable: str) -> int:
    said, least = os.environ[variable], LEAST[variable]
    try:
        number = int(said)
    except ValueError:
        raise PetuneError(
            f"{variable}={said}: should be a whole number; {REMEDY}."
        ) from None
    if number < least:
        raise PetuneError(f"{variable}={said}: should be at least {least}; {REMEDY}.")
    if variable == "MASTER_PORT" and number > LAST_PORT:
        raise PetuneError(f"{variable}={said}: ports end at {LAST_PORT}; {REMEDY}.")
    return number


def _check_meeting(numbers: Mapping[str, int], count: int) -> None:
    """See that the processes can find each other, of which one waits a day for the others."""
    for variable in MEETING:
        if not os.environ.get(variable):
            raise PetuneError(
                f"WORLD_SIZE={count} without {variable}: start petune by torchrun, or unset WORLD_SIZE."
            )
    for rank, size in OUT_OF.items():
        of = numbers.get(size, count)
        if not 0 <= numbers[rank] < of:
            raise PetuneError(
                f"{rank}={numbers[rank]}: the ranks of {of} processes are 0 to {of - 1}; {REMEDY}."
            )
    address = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(address, numbers["MASTER_PORT"])
    except (OSError, UnicodeError) as error:
        raise PetuneError(
            f"MASTER_ADDR={address}: no such host ({error}); {REMEDY}."
        ) from None
