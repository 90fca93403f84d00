#!/usr/bin/env python3
"""Compare the memory that a dry run estimates with the measured peak of the run, by model, adapter and micro-batch.

    python launch/results/dry_run_memory.py [--models tiny,MODEL_DIR] [--sizes 1,2,4,8] [--output dry_run_memory.md]

Each run trains for three steps of DPO on pairs of made-up words, in a process of its own on the CPU; its peak is what the metrics
say of the last step. The last column leaves out what the process holds before it loads a model, in both numbers.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNITS = {"B": 1 / 2**20, "KiB": 1 / 2**10, "MiB": 1.0, "GiB": 2.0**10}
SIZE = r"([\d.]+) (B|KiB|MiB|GiB)"
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


def pairs(path: Path, count: int, words: int) -> Path:
    """Write pairs of made-up words: prompts of half as many words as their completions."""
    dice = random.Random(0)

    def text(size: int) -> str:
        return " ".join("".join(dice.choice("aeioubdklmnrst") for _ in range(4)) for _ in range(size))

    rows = [{"prompt": text(words // 2), "chosen": text(words), "rejected": text(words)} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(words: list[str]) -> str:
    """Run the command, and return what it prints; exit with its output where it fails."""
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words], env={**os.environ, **QUIET}, capture_output=True,
                          text=True, check=False)  # fmt: skip
    if done.returncode:
        sys.exit(f"error: {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def mebibytes(pattern: str, text: str) -> float:
    found = re.search(pattern.replace("SIZE", SIZE), text)
    if found is None:
        sys.exit(f"error: no {pattern} in {text}")
    return float(found[1]) * UNITS[found[2]]


def compared(model: str, peft: str, size: int, batch: int, place: Path) -> str:
    """One line of the table."""
    data = pairs(place / f"{batch}.jsonl", 3 * batch, 48)
    named = model if model == "tiny" else "path"
    words = [
        "loss=dpo", f"peft={peft}", f"model={named}", f"data.train=[{data}]", "data.eval=[]", f"train.microbatch_size={size}",
        "train.microbatch_tokens=null", f"train.batch_size={batch}", "train.steps=3", "checkpoint.every=null", "train.prove=off",
        f"output_root={place}", f"cache_dir={place}/cache", f"exp_name={Path(model).name}-{peft}-{size}-{batch}",
    ]  # fmt: skip
    words += [] if model == "tiny" else [f"model.name_or_path={model}"]
    line = next(line for line in said([*words, "dry_run=true"]).splitlines() if line.startswith("memory "))
    estimate, libraries = mebibytes("about SIZE at the peak", line), mebibytes("libraries SIZE", line)
    said(words)
    metrics = (place / f"{Path(model).name}-{peft}-{size}-{batch}" / "metrics.jsonl").read_text().splitlines()
    peak = [row["peak_memory_mb"] for row in map(json.loads, metrics) if "peak_memory_mb" in row][-1]
    of_all, without = (estimate - peak) / peak, (estimate - peak) / (peak - libraries)
    numbers = (
        f"{estimate:.0f} | {peak:.0f} | {of_all:+.1%} | {estimate - libraries:.0f} | {peak - libraries:.0f} | {without:+.1%}"
    )
    return f"| {Path(model).name} | {peft} | {size} | {batch // size} | {numbers} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny", help="tiny, or directories, with commas between them")
    parser.add_argument("--sizes", default="1,2,4,8", help="pairs in a micro-batch (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a file for the table")
    given = parser.parse_args()
    head = "| model | peft | micro-batch | of a batch | estimate MiB | measured | error | without libraries | measured | error |"
    lines = [head, re.sub(r"[^|]+", " --- ", head)]
    with tempfile.TemporaryDirectory() as place:
        for model in given.models.split(","):
            for peft in ("none", "lora"):
                for size in map(int, given.sizes.split(",")):
                    for several in (1, 2) if size == 2 else (1,):
                        lines.append(compared(model, peft, size, several * size, Path(place)))
                        print(lines[-1], flush=True)
                        if given.output:
                            given.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
