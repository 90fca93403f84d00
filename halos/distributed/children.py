"""Processes that we start: they end with us, and say in the end of their log why they failed."""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import signal
import sys
from pathlib import Path
from typing import NoReturn

from halos.confined import expanded
from halos.distributed.environment import MINE
from halos.distributed.signals import SCHEDULER_SIGNALS
from halos.errors import UserError
from halos.repository import LAUNCH, ROOT

CONFIGS = LAUNCH / "accelerate"
PR_SET_PDEATHSIG = 1
TAIL = 2**14  # bytes of a file that hold its last lines
LINES = 12  # of a failed process's log that are shown
LAUNCHED = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_\w+|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_\w+"
    r"|ACCELERATE_\w+|FSDP_\w+)"
)  # what a launcher tells its ranks


def accelerate_config(name: str, key: str) -> Path:
    """A config file of accelerate: a path, or a name in launch/accelerate. Raises UserError, which names the `key`."""
    for place in (expanded(name), ROOT / name, CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if place.is_file():
            return place
    there = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    raise UserError(f"{key}: there is no file {name}; launch/accelerate has {there}")


def leave(status: int) -> NoReturn:
    """End this process with `status`, which no signal changes any more.

    One of a process group skips the interpreter's own end, and never takes its group down: the threads of a gloo group may
    want the interpreter's lock, which then aborts what was a success, or waits for ever; NCCL's complains of it.
    """
    for number in SCHEDULER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if any(os.environ.get(name) for name in MINE):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def die_with_parent() -> None:
    """In the child, before it begins: when we are killed, so is it. Ranks that it has launched save and leave."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def environment_of_a_start(**more: str) -> dict[str, str]:
    """Our environment without what a launcher has put into it, so that a child can be launched anew."""
    return {name: value for name, value in os.environ.items() if not LAUNCHED.fullmatch(name)} | more


def tail(path: Path) -> str:
    """The end of a text file, nothing where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def last_words(log: Path) -> str:
    """Why a process failed: our one message where there is one, else the end of its log, without the launcher's own report."""
    text = tail(log)
    if errors := re.findall(r"^error: .*", text, re.M):
        return errors[-1]
    parts = re.split(r"^(?=Traceback \(most recent call last\):)", text, flags=re.M)
    own = "".join(part for part in parts if "accelerate/commands/launch" not in part)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", own) if line.strip()]
    return "\n".join(lines[-LINES:]) or "it printed nothing"
