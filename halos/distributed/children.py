"""Child processes: their environment, their end with ours, and why they failed, from the end of their log."""

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
from halos.distributed.environment import RANK_VARIABLES
from halos.distributed.signals import SCHEDULER_SIGNALS
from halos.errors import UserError
from halos.repository import LAUNCH, ROOT

CONFIGS = LAUNCH / "accelerate"
PR_SET_PDEATHSIG = 1
TAIL = 2**14  # bytes read from the end of a log
LINES = 12  # of a failed process's log that are shown
LAUNCHER_VARIABLES = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_\w+|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_\w+"
    r"|ACCELERATE_\w+|FSDP_\w+)"
)  # set by a launcher for its ranks


def accelerate_config(name: str, key: str) -> Path:
    """Find an accelerate config by path, or by name in launch/accelerate. Raises UserError, which names the config key `key`."""
    for path in (expanded(name), ROOT / name, CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    available = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    raise UserError(f"{key}: there is no file {name}; launch/accelerate has {available}")


def exit_process(status: int) -> NoReturn:
    """Exit with `status`, ignoring further signals.

    Ranks use os._exit and never destroy their process group: during interpreter shutdown a gloo thread that wants the GIL
    aborts the process or hangs, and NCCL warns about destroying the group.
    """
    for number in SCHEDULER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if any(os.environ.get(name) for name in RANK_VARIABLES):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def die_with_parent() -> None:
    """preexec_fn: have the kernel kill this child when its parent dies. Ranks that the child launched save and exit."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def environment_without_launcher(**more: str) -> dict[str, str]:
    """Return our environment without the variables of our launcher, for a child that is launched anew, with `more` added."""
    return {name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLES.fullmatch(name)} | more


def tail(path: Path) -> str:
    """Return the end of a text file; empty if there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def failure_reason(log: Path) -> str:
    """Return why a process failed: its `error:` message, or else the end of its log without the launcher's own traceback."""
    text = tail(log)
    if errors := re.findall(r"^error: .*", text, re.M):
        return errors[-1]
    parts = re.split(r"^(?=Traceback \(most recent call last\):)", text, flags=re.M)
    without_launcher = "".join(part for part in parts if "accelerate/commands/launch" not in part)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", without_launcher) if line.strip()]
    return "\n".join(lines[-LINES:]) or "it printed nothing"
