"""The rendezvous has a time limit, heeds signals, and names the ranks that are missing."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests import processes

ROOT = Path(__file__).resolve().parents[2]
JOIN = """
import sys
from datetime import timedelta
from halos.distributed import rendezvous
from halos.distributed.children import exit_process
from halos.errors import UserError
rendezvous.PATIENCE = float(sys.argv[1])
try:
    rendezvous.form_process_group(timedelta(minutes=1))
except UserError as error:
    sys.exit(f"error: {error}")
import torch
import torch.distributed as dist
total = torch.ones(1)
dist.all_reduce(total)
print(int(total), dist.distributed_c10d._get_default_store().timeout, flush=True)
exit_process(0)
"""


def launched(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


def start(rank: int, size: int, port: int, patience: float = 60) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", JOIN, str(patience)]
    return processes.Popen(command, env=launched(rank, size, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_late_ranks_join_and_the_group_has_the_timeout_of_collectives() -> None:
    port = free_port()
    late = [start(rank, 3, port) for rank in (2, 1)]
    time.sleep(0.5)
    for process in (*late, start(0, 3, port)):
        output, errors = process.communicate(timeout=120)
        assert output.split() == ["3", "0:01:00"], errors


def test_missing_ranks_are_named() -> None:
    port = free_port()
    first, other = (start(rank, 4, port, patience=10) for rank in (0, 2))
    message = f"error: 2 of 4 ranks have joined at 127.0.0.1:{port} in 10 s; missing: 1, 3. "
    assert message in first.communicate(timeout=120)[1]
    output = other.communicate(timeout=120)[1]
    assert message in output or f"error: rank 0, at 127.0.0.1:{port}, exited" in output  # whichever ended first
    assert (first.returncode, other.returncode) == (1, 1)


def test_an_absent_rank_0_and_a_port_in_use_are_reported() -> None:
    process = start(1, 2, free_port(), patience=1)
    assert "rank 1 of 2: nothing answers at 127.0.0.1:" in process.communicate(timeout=120)[1]
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        error = start(0, 2, port).communicate(timeout=120)[1]
    assert f"error: rank 0 cannot use port {port} of 127.0.0.1" in error


def test_a_signal_ends_a_rank_that_waits(tmp_path: Path) -> None:
    port = free_port()
    overrides = ["loss=sft", "model=tiny", "data=arithmetic", f"output_root={tmp_path}", "exp_name=run"]
    process = processes.Popen(
        [sys.executable, "train.py", *overrides], cwd=ROOT, env=launched(0, 2, port), stderr=subprocess.PIPE
    )
    until = time.monotonic() + 120
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert not (tmp_path / "run").exists()
