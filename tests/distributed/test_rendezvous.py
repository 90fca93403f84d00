"""Ranks meet in bounded time, heed signals meanwhile, and say who is missing."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests import processes

ROOT = Path(__file__).resolve().parents[2]
MEET = """
import sys
from datetime import timedelta
from halos.distributed import rendezvous
from halos.distributed.children import leave
from halos.errors import UserError
rendezvous.PATIENCE = float(sys.argv[1])
try:
    rendezvous.meet(timedelta(minutes=1))
except UserError as error:
    sys.exit(f"error: {error}")
import torch
import torch.distributed as dist
mine = torch.ones(1)
dist.all_reduce(mine)
print(int(mine), dist.distributed_c10d._get_default_store().timeout, flush=True)
leave(0)
"""


def launched(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


def start(rank: int, size: int, port: int, patience: float = 60) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MEET, str(patience)]
    return processes.Popen(command, env=launched(rank, size, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_all_who_come_work_together_and_wait_as_long_for_each_other_as_a_collective_may_take() -> None:
    place = free_port()
    late = [start(rank, 3, place) for rank in (2, 1)]
    time.sleep(0.5)
    for process in (*late, start(0, 3, place)):
        said, complaints = process.communicate(timeout=120)
        assert said.split() == ["3", "0:01:00"], complaints


def test_who_has_not_come_is_named() -> None:
    place = free_port()
    first, other = (start(rank, 4, place, patience=10) for rank in (0, 2))
    told = f"error: 2 of 4 processes have come together at 127.0.0.1:{place} in 10 s; missing: 1, 3. "
    assert told in first.communicate(timeout=120)[1]
    said = other.communicate(timeout=120)[1]
    assert told in said or f"error: process 0, at 127.0.0.1:{place}, has gone" in said  # whichever ended first
    assert (first.returncode, other.returncode) == (1, 1)


def test_nobody_to_meet_and_a_port_that_another_has_are_said() -> None:
    process = start(1, 2, free_port(), patience=1)
    assert "process 1 of 2 has found nobody at 127.0.0.1:" in process.communicate(timeout=120)[1]
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        place = other.getsockname()[1]
        told = start(0, 2, place).communicate(timeout=120)[1]
    assert f"error: process 0 cannot use port {place} of 127.0.0.1" in told


def test_a_signal_is_heeded_by_one_that_waits(tmp_path: Path) -> None:
    place = free_port()
    words = ["loss=sft", "model=tiny", "data=arithmetic", f"output_root={tmp_path}", "exp_name=run"]
    process = processes.Popen([sys.executable, "train.py", *words], cwd=ROOT, env=launched(0, 2, place), stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", place)) == 0:
                break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert not (tmp_path / "run").exists()
