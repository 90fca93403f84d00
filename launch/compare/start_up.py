#!/usr/bin/env python3
"""Measure the time from the command to the first step, and the overhead of a sweep per job.

    python launch/compare/start_up.py [--repeat 3] [--jobs 4]

model=tiny and the bundled data, tokenised beforehand. The first step ends when its line is in metrics.jsonl. A sweep's overhead
is its wall time for one job at a time, minus that of as many single `accelerate launch` runs.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["loss=sft", "model=tiny", "data=arithmetic", "train.steps=1", "train.batch_size=8", "train.eval_at_start=false",
         "data.eval=[]", "checkpoint.every=null"]  # fmt: skip


def launcher(config: str) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "accelerate" / config)]


def timed(start: list[str], words: list[str], run: Path) -> tuple[float, float]:
    """Return the seconds to the first step, and to the end."""
    began, first = time.perf_counter(), 0.0
    process = subprocess.Popen([*start, str(ROOT / "train.py"), *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = run / "metrics.jsonl"
    while process.poll() is None:
        if not first and metrics.exists() and metrics.stat().st_size:
            first = time.perf_counter() - began
        time.sleep(0.01)
    if process.returncode:
        assert process.stderr is not None
        sys.exit(process.stderr.read().decode()[-2000:])
    return first, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=4, help="of the sweep")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    starts = {"python train.py": [sys.executable], "accelerate launch, 1 process": launcher("cpu1.yaml")}
    starts |= {
        f"accelerate launch, 2 processes{how}": launcher(f"cpu2{file}.yaml") for how, file in (("", ""), (", FSDP2", "_fsdp2"))
    }
    print("| model=tiny | first step after | whole run of one step |")
    print("| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        alone = 0.0
        for name, start in starts.items():
            times = []
            for number in range(given.repeat + 1):
                words = [*WORDS, f"output_root={place}", f"exp_name={abs(hash(name))}-{number}"]
                times.append(timed(start, words, Path(place) / f"{abs(hash(name))}-{number}"))
            first, whole = (statistics.median(column) for column in zip(*times[1:], strict=True))  # the first fills caches
            alone = whole if name.endswith("1 process") else alone
            print(f"| {name} | {first:.1f} s | {whole:.1f} s |", flush=True)
        words = [*WORDS, f"output_root={place}", "exp_name=sweep", "hydra/launcher=accelerate",
                 f"seed={','.join(map(str, range(given.jobs)))}"]  # fmt: skip
        _, whole = timed([sys.executable], ["-m", *words], Path(place) / "none")
    print(f"\na sweep of {given.jobs} such jobs, one at a time: {whole:.1f} s, {whole / given.jobs - alone:+.1f} s a job")


if __name__ == "__main__":
    main()
