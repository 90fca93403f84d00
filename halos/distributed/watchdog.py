"""Watchdog: a rank exits when a local rank dies or another host falls silent, instead of hanging in a collective."""

import ctypes
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from halos.distributed.signals import ORPHANED

log = logging.getLogger(__name__)

PERIOD = 0.5  # seconds between two checks of the local ranks
PATIENCE = 3.0  # seconds to wait for another rank's death, of which this rank's error may be the consequence
HEARTBEAT = 5.0  # seconds between two heartbeats of a host
SILENCE = 60.0  # seconds without a heartbeat after which a host counts as lost
PR_SET_PDEATHSIG = 1


@contextmanager
def watch_ranks(accelerator: Accelerator) -> Iterator[None]:
    """Inside, exit when a local rank dies, and when another host sends no heartbeat for a minute: its power or network is gone.

    An error that another rank's death has caused is not printed. At the end all ranks wait for each other.
    """
    hosts_and_pids, over = _hosts_and_pids(accelerator), threading.Event()
    local = _local_ranks(hosts_and_pids, accelerator.process_index)
    threading.Thread(target=_exit_when_one_dies, args=(local, over), daemon=True).start()
    first_rank_of = {host: hosts_and_pids.index((host, pid)) for host, pid in reversed(hosts_and_pids)}
    if len(first_rank_of) > 1 and accelerator.process_index in first_rank_of.values():
        others = {rank: host for host, rank in first_rank_of.items() if rank != accelerator.process_index}
        arguments = (accelerator.process_index, others, over)
        threading.Thread(target=_exit_when_a_host_is_silent, args=arguments, daemon=True).start()
    try:
        yield
    except Exception as error:
        over.set()
        _exit_if_caused_by_another(local)
        if dist.is_initialized():
            get_error_handler().record_exception(error)  # for the launcher's report
        raise
    finally:
        over.set()
    accelerator.wait_for_everyone()


def request_stop_when_launcher_dies(launched: bool) -> None:
    """Have the kernel send this process ORPHANED when its launcher dies: `accelerate launch` orphans its children.

    Without prctl (not on Linux) a thread polls for a new parent. Not for a process without a launcher: under nohup it is meant
    to outlive its shell.
    """
    if not launched:
        return
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ORPHANED)
        if os.getppid() != parent:
            os.kill(os.getpid(), ORPHANED)
    else:
        threading.Thread(target=_wait_for_new_parent, args=(parent,), daemon=True).start()


def _hosts_and_pids(accelerator: Accelerator) -> list[tuple[str, int]]:
    """All-gather the host and pid of every rank."""
    mine = (socket.gethostname(), os.getpid())
    everyone: list[Any] = [mine] * accelerator.num_processes
    if dist.is_initialized():
        dist.all_gather_object(everyone, mine)
    return everyone


def _local_ranks(hosts_and_pids: list[tuple[str, int]], mine: int) -> dict[int, psutil.Process]:
    """Return the other ranks on this host."""
    here = {rank: pid for rank, (host, pid) in enumerate(hosts_and_pids) if rank != mine and host == socket.gethostname()}
    return {rank: psutil.Process(pid) for rank, pid in here.items()}


def _any_dead(local: dict[int, psutil.Process]) -> bool:
    return any(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in local.values())


def _exit_when_one_dies(local: dict[int, psutil.Process], over: threading.Event) -> None:
    while not over.wait(PERIOD):
        if _any_dead(local) and not over.wait(PATIENCE):  # an error of this rank's own may end it in order meanwhile
            os._exit(1)


def _exit_when_a_host_is_silent(mine: int, others: dict[int, str], over: threading.Event) -> None:
    """Exchange heartbeats between the first ranks of the hosts; `others` maps these ranks to their hosts.

    A collective notices a rank that died, but not a host whose network is gone: it would wait for hours.
    """
    heard = dict.fromkeys(others, time.monotonic())
    threading.Thread(target=_exchange_heartbeats, args=(mine, heard, over), daemon=True).start()
    while not over.wait(HEARTBEAT):
        silent = [host for rank, host in others.items() if time.monotonic() - heard[rank] > SILENCE]
        if silent and not over.is_set():
            log.error("no heartbeat from %s for %.0f s: exiting; resume= continues on the remaining hosts", silent[0], SILENCE)
            logging.shutdown()
            os._exit(1)


def _exchange_heartbeats(mine: int, heard: dict[int, float], over: threading.Event) -> None:
    """Count up under this rank's key of the rendezvous store, and note in `heard` when another rank's count last changed.

    The store lives on rank 0's host. If that host is gone a call may never return, so nothing waits for this thread.
    """
    shared: Any = dist.distributed_c10d._get_default_store()
    store = shared.clone()  # a connection of its own: calls on one connection wait for each other
    store.set_timeout(timedelta(seconds=SILENCE))
    beats, last = 0, dict.fromkeys(heard, b"")
    while not over.wait(HEARTBEAT):
        beats += 1
        try:
            store.set(f"halos/alive/{mine}", str(beats))
            for rank in heard:
                key = f"halos/alive/{rank}"
                count = store.get(key) if store.check([key]) else b""
                if count != last[rank]:
                    last[rank], heard[rank] = count, time.monotonic()
        except RuntimeError:
            continue  # the store may come back


def _exit_if_caused_by_another(local: dict[int, psutil.Process]) -> None:
    deadline = time.monotonic() + PATIENCE
    while local and time.monotonic() < deadline:
        if _any_dead(local):
            os._exit(1)
        time.sleep(PERIOD / 5)


def _wait_for_new_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PERIOD)
    os.kill(os.getpid(), ORPHANED)
