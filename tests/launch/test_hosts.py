"""Two hosts, as network namespaces on this machine: they train together, one is lost, and the run resumes on the other."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RUN = ["loss=sft", "model=tiny", "data=arithmetic", "train.steps=30", "train.batch_size=4", "train.eval_every=null",
       "train.eval_at_start=false", "checkpoint.every=2", "data.eval=[{path: arithmetic, split: 'eval[:6]'}]",
       "plugins=[slow]", "+hooks.slow={_target_: slow.Slow, seconds: 0.3}"]  # fmt: skip
NAMES, ADDRESSES = ("halos-a", "halos-b"), ("10.213.77.1", "10.213.77.2")
ENTER = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"


class Hosts:
    """Two namespaces with one wire between them; each has a name of its own."""

    def __init__(self) -> None:
        from pyroute2 import IPRoute, NetNS, netns

        self.close()
        for name in NAMES:
            netns.create(name)
        with IPRoute() as here:
            here.link("add", ifname="halos0", kind="veth", net_ns_fd=NAMES[0], peer={"ifname": "halos0", "net_ns_fd": NAMES[1]})
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            with NetNS(name) as inside:
                for interface in ("lo", "halos0"):
                    inside.link("set", index=inside.link_lookup(ifname=interface)[0], state="up")
                inside.addr("add", index=inside.link_lookup(ifname="halos0")[0], address=address, prefixlen=24)

    def cut(self) -> None:
        from pyroute2 import NetNS

        with NetNS(NAMES[1]) as inside:
            inside.link("set", index=inside.link_lookup(ifname="halos0")[0], state="down")

    def close(self) -> None:
        from pyroute2 import netns

        for name in set(NAMES) & set(netns.listnetns()):
            netns.remove(name)

    def start(self, number: int, words: list[str], log: Path) -> subprocess.Popen[bytes]:
        inside = [
            "nsenter",
            f"--net=/var/run/netns/{NAMES[number]}",
            "unshare",
            "--uts",
            sys.executable,
            "-c",
            ENTER,
            NAMES[number],
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "halos0",
                       "TP_SOCKET_IFNAME": "halos0", "PYTHONPATH": str(Path(__file__).parent)}  # fmt: skip
        with log.open("wb") as file:
            return subprocess.Popen([*inside, *words], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    pytest.importorskip("pyroute2", reason="namespaces are made with pyroute2")
    from pyroute2 import NetlinkError

    if sys.platform != "linux" or os.geteuid():
        pytest.skip("network namespaces are made by root on Linux")
    try:
        made = Hosts()
    except (OSError, NetlinkError) as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")
    yield made
    made.close()


def together(hosts: Hosts, words: list[str], place: Path) -> list[subprocess.Popen[bytes]]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu2.yaml",
              "--same_network", "--num_machines=2", "--num_processes=2", f"--main_process_ip={ADDRESSES[0]}",
              "--main_process_port=29517"]  # fmt: skip
    return [
        hosts.start(rank, [*launch, "--machine_rank", str(rank), "train.py", *words], place / f"{NAMES[rank]}.log")
        for rank in (0, 1)
    ]


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        top = psutil.Process(process.pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines() if '"train"' in line] if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["killed", "cut"])
def test_a_host_is_lost_and_the_run_resumes_on_the_other(loss: str, hosts: Hosts, tmp_path: Path, cache: Path) -> None:
    run = tmp_path / "run"
    words = [*RUN, f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]
    processes = together(hosts, words, tmp_path)
    until = time.monotonic() + 120
    while len(steps(run)) < 6 and time.monotonic() < until and all(each.poll() is None for each in processes):
        time.sleep(0.2)
    told = "\n".join((tmp_path / f"{name}.log").read_text() for name in NAMES)
    assert len(steps(run)) >= 6, told
    record = yaml.safe_load((run / "attempts" / "000.yaml").read_text())
    assert record["world_size"] == 2
    lost = family(processes[1])
    if loss == "killed":
        for process in lost:
            process.send_signal(signal.SIGKILL)
    else:
        hosts.cut()
    began = time.monotonic()
    assert processes[0].wait(timeout=120) != 0
    if loss == "killed":
        assert time.monotonic() - began < 15
    else:
        assert "no heartbeat from halos-b" in (tmp_path / "halos-a.log").read_text()
        assert processes[1].wait(timeout=60) != 0
        assert "no heartbeat from halos-a" in (tmp_path / "halos-b.log").read_text()
    assert steps(run)[-1] < 30
    alone = hosts.start(
        0, [sys.executable, "train.py", f"resume={run}", "plugins=[slow]", "hooks.slow.seconds=0"], tmp_path / "alone.log"
    )
    assert alone.wait(timeout=200) == 0, (tmp_path / "alone.log").read_text()
    assert steps(run) == list(range(1, 31))
    assert json.loads((run / "result.json").read_text())["status"] == "finished"
    assert yaml.safe_load((run / "attempts" / "001.yaml").read_text())["world_size"] == 1
