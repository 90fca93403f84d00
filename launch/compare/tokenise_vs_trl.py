#!/usr/bin/env python3
"""Compare the speed of tokenising preference pairs: halos, a plain loop over rows, and TRL's own preparation in two processes.

    python launch/compare/tokenise_vs_trl.py --tokenizer DIRECTORY --trl PYTHON [--pairs 200000]

PYTHON is the interpreter of an environment with TRL 1.16. All three read one file of made-up chats and apply the tokenizer's chat
template; halos and TRL write what they have tokenised to the disk. The loop renders and tokenises the prompt, the prompt with the
chosen answer and the prompt with the rejected one, row by row in one process. Each runs in a process of its own, one by one;
seconds are those from its first row on, CPU seconds those of all its processes, their start included. Nothing else should run
meanwhile; `taskset -c 0,1` restricts all to two cores.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


def write_pairs(path: Path, count: int, words: int) -> None:
    """Prompts of a third of the words, and two answers that share the others."""
    dice, syllables = random.Random(0), ["ba", "cel", "di", "fo", "gun", "la", "mer", "ni", "po", "sta", "tri", "ven"]
    vocabulary = ["".join(dice.choices(syllables, k=dice.choice((1, 2, 2, 3)))) for _ in range(5000)]
    with path.open("w") as file:
        for _ in range(count):
            asked, chosen, rejected = (" ".join(dice.choices(vocabulary, k=max(1, words // 3))) for _ in range(3))
            row = {"prompt": [{"role": "user", "content": asked}], "chosen": [{"role": "assistant", "content": chosen}],
                   "rejected": [{"role": "assistant", "content": rejected}]}  # fmt: skip
            file.write(json.dumps(row) + "\n")


def halos(data: Path, tokenizer: str, place: Path) -> float:
    sys.path.insert(0, str(ROOT))
    from halos.data.prepare import prepare
    from halos.models.load import load_tokenizer
    from halos.types import Comparison

    loaded, _ = load_tokenizer(Path(tokenizer), add_tokens=[])
    began = time.perf_counter()
    prepare([str(data)], kind=Comparison, tokenizer=loaded, max_length=1024, truncation="drop", score="last", cache_dir=place)
    return time.perf_counter() - began


def loop(data: Path, tokenizer: str, place: Path) -> float:
    from transformers import AutoTokenizer

    loaded, tokens, began = AutoTokenizer.from_pretrained(tokenizer), 0, time.perf_counter()
    with data.open() as file:
        for line in file:
            row = json.loads(line)
            prompt = loaded.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
            answers = [
                loaded.apply_chat_template(row["prompt"] + row[name], return_dict=True)["input_ids"]
                for name in ("chosen", "rejected")
            ]
            tokens += sum(len(each) for each in (prompt, *answers))
    assert tokens
    return time.perf_counter() - began


def trl(data: Path, tokenizer: str, place: Path) -> float:
    from datasets import load_dataset  # pyrefly: ignore
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer  # pyrefly: ignore

    loaded, trainer = AutoTokenizer.from_pretrained(tokenizer), object.__new__(DPOTrainer)
    trainer._tokenizer = loaded
    settings = DPOConfig(output_dir=str(place), dataset_num_proc=2, max_length=1024, use_cpu=True, report_to="none")
    began = time.perf_counter()
    rows = load_dataset("json", data_files=str(data), split="train", cache_dir=str(place))
    trainer._prepare_dataset(rows, loaded, settings, "train")
    return time.perf_counter() - began


PARTS = {"halos": halos, "loop": loop, "trl": trl}


def measured(part: str, python: str, data: Path, tokenizer: str) -> tuple[float, float]:
    """Seconds, and CPU seconds, of one part in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as place:
        words = [python, __file__, "--part", part, "--data", str(data), "--tokenizer", tokenizer, "--place", place]
        done = subprocess.run(words, env={**os.environ, **QUIET}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {part}: {done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(done.stdout.rpartition("seconds ")[2]), cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="the directory of a model")
    parser.add_argument("--trl", help="the interpreter of TRL's environment; without it TRL is left out")
    parser.add_argument("--pairs", type=int, default=200_000, help="rows (default: %(default)s)")
    parser.add_argument("--words", type=int, default=280, help="words of a row (default: %(default)s)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        print(f"seconds {PARTS[given.part](given.data, given.tokenizer, given.place)}")
        return
    with tempfile.TemporaryDirectory() as place:
        write_pairs(data := Path(place) / "pairs.jsonl", given.pairs, given.words)
        print(f"| {given.pairs:,} pairs | seconds | rows/s | halos is faster by | CPU seconds |\n| --- | --- | --- | --- | --- |")
        ours = None
        for part, python in (("halos", sys.executable), ("loop", sys.executable), ("trl", given.trl)):
            if python:
                seconds, cpu = measured(part, python, data, given.tokenizer)
                ours = ours or seconds
                print(f"| {part} | {seconds:.1f} | {given.pairs / seconds:.0f} | {seconds / ours:.2f} | {cpu:.1f} |", flush=True)


if __name__ == "__main__":
    main()
