"""Processes that look after each other: when one is gone the others leave at once, and the one at fault speaks last."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

PERIOD = 0.5  # seconds between two looks
PATIENCE = 3.0  # seconds in which a process that failed shows whether it was for another's sake
PR_SET_PDEATHSIG = 1


@contextmanager
def together(made: Accelerator) -> Iterator[None]:
    """Inside, a process whose neighbour on this host has died ends at once, instead of waiting in a collective.

    An error that is only the echo of another process's is not printed. On the way out all wait for each other.
    """
    neighbours, over = _neighbours(made), threading.Event()
    threading.Thread(target=_look, args=(neighbours, over), daemon=True).start()
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
    if dist.is_initialized():  # a gloo group that is left to the interpreter's exit aborts now and then
        dist.destroy_process_group()


def outlive_no_launcher(launched: bool) -> None:
    """Have the kernel send this process SIGTERM when its launcher dies: `accelerate launch` orphans its children.

    Where there is no such call, a thread looks for a new parent. Not for a process that nobody launched: under nohup it
    is meant to outlive its shell.
    """
    if not launched:
        return
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
    else:
        threading.Thread(target=_await_new_parent, args=(parent,), daemon=True).start()


def _neighbours(made: Accelerator) -> dict[int, psutil.Process]:
    """The other processes of the run on this host, by rank."""
    everyone: list[Any] = [None] * made.num_processes
    if dist.is_initialized():
        dist.all_gather_object(everyone, (socket.gethostname(), os.getpid()))
    mine = made.process_index
    here = {rank: place[1] for rank, place in enumerate(everyone) if place and rank != mine and place[0] == socket.gethostname()}
    return {rank: psutil.Process(pid) for rank, pid in here.items()}


def _gone(neighbours: dict[int, psutil.Process]) -> bool:
    return any(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in neighbours.values())


def _look(neighbours: dict[int, psutil.Process], over: threading.Event) -> None:
    while not over.wait(PERIOD):
        if _gone(neighbours) and not over.wait(PATIENCE):  # a moment, in which an error of ours may end us in order
            os._exit(1)


def _leave_if_an_echo(neighbours: dict[int, psutil.Process]) -> None:
    until = time.monotonic() + PATIENCE
    while neighbours and time.monotonic() < until:
        if _gone(neighbours):
            os._exit(1)
        time.sleep(PERIOD / 5)


def _await_new_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PERIOD)
    os.kill(os.getpid(), signal.SIGTERM)
