"""Form the process group: within a time limit, interruptible by signals, and naming the ranks that are missing."""

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from halos.distributed.device import uses_gpu
from halos.distributed.environment import RENDEZVOUS_VARIABLES, count_from_environment, world_size
from halos.errors import UserError

PATIENCE = 600.0  # seconds between the first rank and the last: a scheduler does not start all hosts at once
PERIOD = 0.1  # seconds between two polls; signal handlers run in between
STORE_TIMEOUT = timedelta(seconds=5)  # for one call to the store
COLLECTIVE_TIMEOUT = timedelta(hours=6)  # one rank tokenises, scores, or proves a merge, while the others wait in a collective
ALL_PRESENT = "halos/everyone"


def form_process_group(timeout: timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Initialise torch.distributed with the ranks that a launcher has started; do nothing if there is no launcher. `timeout` is
    for the group's collectives. Raises UserError if some rank is missing after ten minutes.

    torch's own rendezvous waits as long as a collective may take, ignores signals meanwhile, and does not say for whom.
    """
    if dist.is_initialized() or not all(os.environ.get(name) for name in RENDEZVOUS_VARIABLES):
        return
    rank, size = count_from_environment("RANK", 0), world_size()
    deadline = time.monotonic() + PATIENCE
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    store = _open_store(rank, size, address, deadline)
    try:
        _wait_for_all_ranks(store, rank, size, address, deadline)
    except dist.DistError as error:
        raise UserError(f"rank 0, at {address}, exited before all {size} ranks had joined: see its own message") from error
    store.set_timeout(timeout)
    backend = "cuda:nccl,cpu:gloo" if uses_gpu() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _open_store(rank: int, size: int, address: str, deadline: float) -> dist.TCPStore:
    """The key-value store that the ranks share before they have a group: the launcher's, or else rank 0's."""
    host, _, port = address.rpartition(":")
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not serves and not _accepts_connections(host, int(port)):
        if time.monotonic() > deadline:
            raise UserError(f"rank {rank} of {size}: nothing answers at {address} after {PATIENCE:.0f} s: see rank 0's message")
        time.sleep(PERIOD)
    try:
        return dist.TCPStore(host, int(port), size, serves, STORE_TIMEOUT, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        remedy = "give the run another one (--main_process_port, MASTER_PORT)"
        raise UserError(f"rank {rank} cannot use port {port} of {host}: {reason}; {remedy}") from error


def _accepts_connections(host: str, port: int) -> bool:
    """Probe the port first, since torch prints a warning for every attempt that fails."""
    try:
        socket.create_connection((host, port), STORE_TIMEOUT.total_seconds()).close()
    except OSError:
        return False
    return True


def _wait_for_all_ranks(store: dist.TCPStore, rank: int, size: int, address: str, deadline: float) -> None:
    store.set(_presence_key(rank), socket.gethostname())
    if store.add("halos/come", 1) == size:
        store.set(ALL_PRESENT, "")
    while not store.check([ALL_PRESENT]):
        if time.monotonic() > deadline:
            missing = [str(other) for other in range(size) if not store.check([_presence_key(other)])]
            raise UserError(
                f"{size - len(missing)} of {size} ranks have joined at {address} in {PATIENCE:.0f} s; missing:"
                f" {', '.join(missing)}. See their own messages"
            )
        time.sleep(PERIOD)


def _presence_key(rank: int) -> str:
    return f"halos/here/{rank}"
