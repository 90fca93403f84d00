"""A check that all ranks agree: on data, hooks, tensors, and whether something is wrong; and what rank 0 alone computes."""

import socket
import time
from collections.abc import Callable
from itertools import zip_longest
from typing import TypeVar

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object

from halos.distributed.environment import world_size
from halos.distributed.rendezvous import PATIENCE, PERIOD
from halos.errors import UserError

Value = TypeVar("Value")


def require_same_on_all_ranks(accelerator: Accelerator, name: str, text: str | None, problem: str | None = None) -> None:
    """Compare `text` over all ranks. Raises UserError on every rank if one has another text, or a `problem`. Every rank calls.

    Ranks on other hosts read other files, and would silently train on them.
    """
    everyone = gather_object([(socket.gethostname(), text, problem)])
    first_host, first_text, first_problem = everyone[0]
    for rank, (host, theirs, problem_there) in enumerate(everyone):
        if problem_there is not None:
            raise UserError(problem_there if problem_there == first_problem else f"rank {rank} on {host}: {problem_there}")
        if theirs != first_text:
            lines = zip_longest((first_text or "").splitlines(), (theirs or "").splitlines(), fillvalue="nothing")
            expected, actual = next(pair for pair in lines if pair[0] != pair[1])
            raise UserError(
                f"the {name} of rank {rank} on {host} is not that of rank 0 on {first_host}: {actual.strip()} instead of"
                f" {expected.strip()}. Every rank needs the same command, and every host the same files"
            )


def wait_for_all_ranks(event: str, patience: float = PATIENCE) -> int:
    """Return how many ranks have come to `event`, a name that no other has: all, or those that have after `patience` seconds. It
    is no collective: the others may be waiting in one."""
    size = world_size()
    if size == 1 or not dist.is_initialized():
        return size
    store, deadline = dist.distributed_c10d._get_default_store(), time.monotonic() + patience
    come = store.add(f"halos/{event}", 1)
    while come < size and time.monotonic() < deadline:
        time.sleep(PERIOD)
        come = store.add(f"halos/{event}", 0)
    return come


def from_rank_0(accelerator: Accelerator, function: Callable[[], Value]) -> Value:
    """Call the function on rank 0, and return its value on every rank. Every rank calls. An OSError or UserError of rank 0 is
    raised there, and on the other ranks a UserError with its message."""
    value, error = None, None
    if accelerator.is_main_process:
        try:
            value = function()
        except (OSError, UserError) as problem:
            error = problem
    value, message = gather_object([(value, None if error is None else str(error))])[0]
    if error is not None:
        raise error
    if message is not None:
        raise UserError(message)
    return value
