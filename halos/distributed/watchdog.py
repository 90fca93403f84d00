"""Processes that look after each other: when one is gone the others leave, and the one at fault speaks last."""

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

PERIOD = 0.5  # seconds between two looks
PATIENCE = 3.0  # seconds in which a process that failed shows whether it was for another's sake
BEAT = 5.0  # seconds between two signs of life of a host
SILENCE = 60.0  # seconds without one after which a host counts as lost
PR_SET_PDEATHSIG = 1


@contextmanager
def together(made: Accelerator) -> Iterator[None]:
    """Inside, a process whose neighbour on this host has died ends at once, instead of waiting in a collective; and all of a
    host end when another host has given no sign of life for a minute: its power or its network is gone.

    An error that is only the echo of another process's is not printed. On the way out all wait for each other.
    """
    places, over = _places(made), threading.Event()
    neighbours = _neighbours(places, made.process_index)
    threading.Thread(target=_look, args=(neighbours, over), daemon=True).start()
    first_of = {host: places.index((host, pid)) for host, pid in reversed(places)}
    if len(first_of) > 1 and made.process_index in first_of.values():
        others = {rank: host for host, rank in first_of.items() if rank != made.process_index}
        threading.Thread(target=_hear, args=(made.process_index, others, over), daemon=True).start()
    try:
        yield
    except Exception as error:
        over.set()
        _leave_if_an_echo(neighbours)
        if dist.is_initialized():
            get_error_handler().record_exception(error)  # for the launcher's own last words
        raise
    finally:
        over.set()
    made.wait_for_everyone()


def request_stop_when_launcher_dies(launched: bool) -> None:
    """Have the kernel send this process ORPHANED when its launcher dies: `accelerate launch` orphans its children.

    Where there is no such call, a thread looks for a new parent. Not for a process that nobody launched: under nohup it
    is meant to outlive its shell.
    """
    if not launched:
        return
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ORPHANED)
        if os.getppid() != parent:
            os.kill(os.getpid(), ORPHANED)
    else:
        threading.Thread(target=_await_new_parent, args=(parent,), daemon=True).start()


def _places(made: Accelerator) -> list[tuple[str, int]]:
    """Host and pid of every process of the run, by rank."""
    mine = (socket.gethostname(), os.getpid())
    everyone: list[Any] = [mine] * made.num_processes
    if dist.is_initialized():
        dist.all_gather_object(everyone, mine)
    return everyone


def _neighbours(places: list[tuple[str, int]], mine: int) -> dict[int, psutil.Process]:
    """The other processes of the run on this host, by rank."""
    here = {rank: pid for rank, (host, pid) in enumerate(places) if rank != mine and host == socket.gethostname()}
    return {rank: psutil.Process(pid) for rank, pid in here.items()}


def _gone(neighbours: dict[int, psutil.Process]) -> bool:
    return any(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in neighbours.values())


def _look(neighbours: dict[int, psutil.Process], over: threading.Event) -> None:
    while not over.wait(PERIOD):
        if _gone(neighbours) and not over.wait(PATIENCE):  # a moment, in which an error of ours may end us in order
            os._exit(1)


def _hear(mine: int, others: dict[int, str], over: threading.Event) -> None:
    """One process of each host tells that it lives, and listens for the `others`.

    A collective notices a process that died, and not a host whose network is gone: it would wait for hours.
    """
    heard = dict.fromkeys(others, time.monotonic())
    threading.Thread(target=_exchange, args=(mine, heard, over), daemon=True).start()
    while not over.wait(BEAT):
        silent = [host for rank, host in others.items() if time.monotonic() - heard[rank] > SILENCE]
        if silent and not over.is_set():
            log.error("no sign of life from %s for %.0f s: leaving; resume= goes on, on the hosts there are", silent[0], SILENCE)
            logging.shutdown()
            os._exit(1)


def _exchange(mine: int, heard: dict[int, float], over: threading.Event) -> None:
    """Signs of life through the rendezvous store, which lies on the first process's host. Where that host is gone a call may
    never come back, so nobody waits for this thread."""
    shared: Any = dist.distributed_c10d._get_default_store()
    store = shared.clone()  # a connection of its own: calls may wait for each other
    store.set_timeout(timedelta(seconds=SILENCE))
    told, last = 0, dict.fromkeys(heard, b"")
    while not over.wait(BEAT):
        told += 1
        try:
            store.set(f"halos/alive/{mine}", str(told))
            for rank in heard:
                key = f"halos/alive/{rank}"
                said = store.get(key) if store.check([key]) else b""
                if said != last[rank]:
                    last[rank], heard[rank] = said, time.monotonic()
        except RuntimeError:
            continue  # it may come back


def _leave_if_an_echo(neighbours: dict[int, psutil.Process]) -> None:
    until = time.monotonic() + PATIENCE
    while neighbours and time.monotonic() < until:
        if _gone(neighbours):
            os._exit(1)
        time.sleep(PERIOD / 5)


def _await_new_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PERIOD)
    os.kill(os.getpid(), ORPHANED)
