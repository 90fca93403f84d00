"""The processes of a run come together: in bounded time, heeding signals, and naming who is missing."""

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from halos.distributed.device import uses_gpu
from halos.distributed.environment import MEETING, number_of, world_size
from halos.errors import UserError

PATIENCE = 600.0  # seconds between the first process and the last: the hosts of a queue do not start at once
PERIOD = 0.1  # seconds between two looks; in between, signals are heeded
CALL = timedelta(seconds=5)  # for one call to the store
WORK = timedelta(hours=6)  # one process tokenises, scores, or proves a merge, while the others wait in a collective
EVERYONE = "halos/everyone"


def meet(timeout: timedelta = WORK) -> None:
    """Make the process group of what a launcher has started; nothing where nobody launched this process. Its collectives wait
    for each other as long as `timeout`. Raises UserError where not all have come within ten minutes.

    torch's own rendezvous waits as long as a collective may take, hears no signal meanwhile, and does not say for whom.
    """
    if dist.is_initialized() or not all(os.environ.get(name) for name in MEETING):
        return
    rank, size = number_of("RANK", 0), world_size()
    until = time.monotonic() + PATIENCE
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    store = _store(rank, size, where, until)
    try:
        _await_everyone(store, rank, size, where, until)
    except dist.DistError as error:
        raise UserError(f"process 0, at {where}, has gone before all {size} had come: it says why itself") from error
    store.set_timeout(timeout)
    backend = "cuda:nccl,cpu:gloo" if uses_gpu() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _store(rank: int, size: int, where: str, until: float) -> dist.TCPStore:
    """What the processes share until they have a group: the launcher's, or else the first process's."""
    host, _, port = where.rpartition(":")
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not serves and not _listens(host, int(port)):
        if time.monotonic() > until:
            raise UserError(
                f"process {rank} of {size} has found nobody at {where} in {PATIENCE:.0f} s: the words of process 0 say why"
            )
        time.sleep(PERIOD)
    try:
        return dist.TCPStore(host, int(port), size, serves, CALL, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        words = str(error).splitlines()[0]
        other = "give the run another one (--main_process_port, MASTER_PORT)"
        raise UserError(f"process {rank} cannot use port {port} of {host}: {words}; {other}") from error


def _listens(host: str, port: int) -> bool:
    """Asked first, since torch prints a warning for every attempt that fails."""
    try:
        socket.create_connection((host, port), CALL.total_seconds()).close()
    except OSError:
        return False
    return True


def _await_everyone(store: dist.TCPStore, rank: int, size: int, where: str, until: float) -> None:
    store.set(_sign(rank), socket.gethostname())
    if store.add("halos/come", 1) == size:
        store.set(EVERYONE, "")
    while not store.check([EVERYONE]):
        if time.monotonic() > until:
            missing = [str(other) for other in range(size) if not store.check([_sign(other)])]
            raise UserError(
                f"{size - len(missing)} of {size} processes have come together at {where} in {PATIENCE:.0f} s; missing:"
                f" {', '.join(missing)}. They say why themselves"
            )
        time.sleep(PERIOD)


def _sign(rank: int) -> str:
    return f"halos/here/{rank}"
