#!/usr/bin/env python3
"""Compare the time from the command to the first step: `python train.py loss=dpo peft=lora`, and `trl dpo`.

    python launch/compare/first_step_vs_trl.py MODEL_DIR --trl-python PYTHON [--repeats 3]

PYTHON is the interpreter of an environment with TRL 1.16 (pip install torch==2.13.0 trl==1.16.0 peft). Both read one file of 64
made-up chats for the first time, load the model and attach an adapter of rank 16; the time ends where the first step begins.
In turn, in an empty cache each; a ratio is the median of the ratios of each turn. Nothing else should run meanwhile.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenise_vs_trl import write_pairs

ROOT = Path(__file__).resolve().parents[2]
ENDS_HERE = "FIRST_STEP"  # the environment variable that names the file to which the time is written
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}

HOOK = f"""
import os, time
from pathlib import Path
from halos.hooks.base import Hook

class EndsAtFirstStep(Hook):
    def on_start(self, run):
        def begin(step):
            Path(os.environ["{ENDS_HERE}"]).write_text(repr(time.time()))
            os._exit(0)
        run.learning_rates.set = begin  # what a step does first
"""

SITE = f"""
import os, sys, time
from importlib.machinery import PathFinder

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "transformers.trainer":
            return None
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            def begin(*_, **__):
                with open(os.environ["{ENDS_HERE}"], "w") as file:
                    file.write(repr(time.time()))
                os._exit(0)
            module.Trainer.training_step = begin
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def ours(model: str, rows: Path, place: Path) -> list[str]:
    return [
        sys.executable, str(ROOT / "train.py"), "loss=dpo", "peft=lora", "peft.r=16", f"model.name_or_path={model}",
        f"data.train=['{rows}']", "data.eval=[]", "train.steps=3", "train.batch_size=4", "checkpoint.every=null",
        f"output_root={place}/runs", "exp_name=run", f"cache_dir={place}/cache", "plugins=[ends]",
        "+hooks.ends._target_=ends.EndsAtFirstStep",
    ]  # fmt: skip


def trl(python: str, model: str, rows: Path, place: Path) -> list[str]:
    return [
        str(Path(python).with_name("trl")), "dpo", "--model_name_or_path", model, "--dataset_name", str(rows.parent),
        "--use_peft", "--lora_r", "16", "--output_dir", f"{place}/out", "--max_steps", "3", "--per_device_train_batch_size", "4",
        "--report_to", "none", "--use_cpu", "--bf16", "false",
    ]  # fmt: skip


def timed(command: list[str], place: Path) -> tuple[float, float]:
    """Seconds, and CPU-seconds of all processes, until the first step begins."""
    began, before, path = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN), place / "began"
    environment = {**os.environ, **QUIET, ENDS_HERE: str(path), "PYTHONPATH": str(place), "HF_HOME": f"{place}/hf"}
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, check=False)
    if not path.is_file():
        sys.exit(f"error: {' '.join(command[:3])} took no step:\n{(done.stdout + done.stderr)[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return float(path.read_text()) - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory with a language model and a chat template")
    parser.add_argument("--trl-python", required=True, help="an interpreter that has trl 1.16, peft and torch")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: %(default)s)")
    given = parser.parse_args()
    model, python = str(Path(given.model).resolve()), os.path.abspath(given.trl_python)
    if not Path(python).with_name("trl").is_file():
        parser.error(f"{given.trl_python}: there is no command trl beside it")
    turns: dict[str, list[tuple[float, float]]] = {"halos": [], "trl dpo": []}
    with tempfile.TemporaryDirectory() as root:
        (data := Path(root) / "data").mkdir()
        write_pairs(rows := data / "train.jsonl", 64, 120)
        for turn in range(given.repeats):
            for who, code in (("halos", ("ends.py", HOOK)), ("trl dpo", ("sitecustomize.py", SITE))):
                (place := Path(root) / f"{who[:3]}{turn}").mkdir()
                (place / code[0]).write_text(code[1])
                command = ours(model, rows, place) if who == "halos" else trl(python, model, rows, place)
                turns[who].append(timed(command, place))
                print(f"{who}: {turns[who][-1][0]:.1f} s, {turns[who][-1][1]:.1f} CPU-s", file=sys.stderr, flush=True)
    print("| | first step begins after, s | ratio | CPU-s | ratio |\n| --- | --- | --- | --- | --- |")
    for who, times in turns.items():
        pairs = list(zip(turns["halos"], times, strict=True))
        cells = [f"{statistics.median(one[n] for one in times):.1f} | {statistics.median(a[n] / b[n] for a, b in pairs):.2f}"
                 for n in (0, 1)]  # fmt: skip
        print(f"| {who} | {cells[0]} | {cells[1]} |")
    print("\nA ratio is halos / TRL.")


if __name__ == "__main__":
    main()
