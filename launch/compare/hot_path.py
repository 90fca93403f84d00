#!/usr/bin/env python3
"""Compare the speed and memory of training with TRL's, in turn, on the same rows, model, batches and learning rates.

    python launch/compare/hot_path.py MODEL_DIR [DATA] --trl-python PYTHON [--only dpo-lora,kto-lora] [--repeats 3]
    python launch/compare/hot_path.py MODEL_DIR [DATA] --no-trl --only dpo-lora --repeats 1 --set train.microbatch_size=8

DATA is a .jsonl with prompt, chosen and rejected (text or messages), or a directory with GSM8K's model_solutions.jsonl; without
it, pairs of made-up words with the lengths of dialogues. TRL needs an environment of its own: pip install torch==2.13.0
trl==1.16.0 peft. Everything runs on the CPU with one thread; halos through its public command, each run with an empty cache.

Useful tokens are those of the prompt and the completion of every row, whatever is computed. They are divided by the CPU-seconds
of all steps but the first, and of the reference's log-probs where those are computed beforehand (but not of the old log-probs
of rollouts, which a live loop's step does not need). The floor is the time of the FLOPs that these rows need, each prompt once
for its pair or group, at the rate of a matrix product in the same process. Memory is the peak above the loaded model. All
numbers are medians; a ratio is the median of the ratios of each turn. "fused" is TRL's head on completion rows alone, which it
has on GPUs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hot_path_data import choose
from hot_path_table import Results, derived, line, markdown
from hot_path_workloads import WORKLOADS, Dimensions, Rows, commands, written
from tqdm import tqdm

from halos.errors import UserError

TRL = "1.16"


def run(title: str, command: list[str], more: dict[str, str], output: Path) -> dict[str, Any]:
    """Run a process that measures itself; exit with the end of its output if it fails."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile() as log:
        environment = {**os.environ, **one_thread, **quiet, **more, "HOT_PATH_BEGAN": str(time.time())}
        status = subprocess.run(command, stdout=log, stderr=log, env=environment, cwd=output.parent, check=False).returncode
        if status or not output.is_file():
            log.seek(0)
            sys.exit(f"error: {title} failed, status {status}:\n{log.read().decode(errors='replace')[-3000:]}")
    return json.loads(output.read_text())


def measure(prepared: dict[str, Rows], size: Dimensions, given: argparse.Namespace, work: Path, about: dict[str, Any]) -> Results:
    """Run every workload with every implementation in turn, and write the results, with what is said `about` them."""
    results: Results = {name: {} for name in prepared}
    runs = {name: commands(name, rows, size, given) for name, rows in prepared.items()}
    planned = [(name, who, turn) for turn in range(given.repeats) for name in runs for who in runs[name]]
    for name, who, turn in (bar := tqdm(planned, unit="run", disable=None)):
        bar.set_description(f"{name} {who}")
        output = work / f"{name}-{who}-{turn}.json"
        raw = run(f"{name}, {who}", *runs[name][who](output), output)
        result = derived(raw, prepared[name].tokens, prepared[name].flops, counts_before=WORKLOADS[name].refers)
        results[name].setdefault(who, []).append(result)
        given.output.write_text(json.dumps(about | {"results": results}, indent=1))  # now, since a later run may fail
        tqdm.write(f"{name} {who}: {line(result)}", file=sys.stderr)
    return results


def check_trl(python: str | None) -> str:
    """Return TRL's version. Raises UserError if the interpreter does not have it."""
    hint = f"--trl-python names an interpreter with trl {TRL} (pip install torch==2.13.0 trl=={TRL}.0 peft); or --no-trl"
    if python is None:
        raise UserError(hint)
    code = "import importlib.metadata as m; print(m.version('trl'), m.version('torch'), m.version('peft'))"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{python}: no interpreter with trl, torch and peft; {hint}") from error
    if not found[0].startswith(TRL + "."):
        raise UserError(f"{python} has trl {found[0]}; {hint}")
    return found[0]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory with a language model and a chat template")
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--trl-python", help=f"an interpreter that has trl {TRL}, peft and torch")
    parser.add_argument("--no-trl", action="store_true", help="halos alone")
    parser.add_argument("--only", default=",".join(WORKLOADS), help="workloads, with commas between them (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: 3)")
    parser.add_argument("--steps", type=int, default=8, help="of each run; the first one warms up (default: 8)")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs per step, or their halves (default: 4)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens (default: 512)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="(default: the one that is multiplied faster)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of the rows")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further keys for halos")
    parser.add_argument("--output", type=Path, default=Path("hot_path.json"), help="the results (default: %(default)s)")
    given = parser.parse_args()
    if wrong := set(given.only.split(",")) - WORKLOADS.keys():
        parser.error(f"no workload {', '.join(sorted(wrong))}; there are {', '.join(WORKLOADS)}")
    if given.steps < 2 or given.repeats < 1 or given.batch_size < 1:
        parser.error("at least 2 steps (the first one warms up), 1 repeat and a batch of 1")
    if not (Path(given.model) / "config.json").is_file():
        parser.error(f"{given.model}: no directory with a model")
    if given.data is not None and not given.data.exists():
        parser.error(f"{given.data}: not found")
    given.model, given.only = Path(given.model).resolve(), given.only.split(",")
    if given.trl_python and os.sep in given.trl_python:
        given.trl_python = os.path.abspath(given.trl_python)  # without following the link to the interpreter that it extends
    return given


def main() -> None:
    given = arguments()
    version = None if given.no_trl else check_trl(given.trl_python)
    from transformers import AutoTokenizer

    from halos.inspection.speed import fast_dtype

    given.dtype = given.dtype or fast_dtype()
    tokenizer, size = AutoTokenizer.from_pretrained(given.model), Dimensions.of(str(given.model))
    pairs, dropped = choose(given.data, tokenizer, count=given.steps * given.batch_size, limit=given.max_length, seed=given.seed)
    print(f"{len(pairs)} pairs of {given.data or 'made-up words'}; {dropped} others were longer than {given.max_length} tokens")
    mean = statistics.mean(sum(pair.lengths) + pair.lengths[0] for pair in pairs) / 2
    about = {"settings": {key: str(value) for key, value in vars(given).items()}, "trl": version, "mean_sequence_tokens": mean}
    with tempfile.TemporaryDirectory() as place:
        prepared = {name: written(name, pairs, tokenizer, size, given, Path(place)) for name in given.only}
        results = measure(prepared, size, given, Path(place), about)
    print(markdown(results))
    print(f"\n{given.model.name}, {given.dtype}, {given.steps} steps of {given.batch_size} pairs, {mean:.0f} tokens a sequence,"
          f" one thread, {given.repeats} turns; {given.output}")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
