#!/usr/bin/env python3
# ruff: noqa: E402
"""Train every loss from one start over the same rows, and measure all of them alike.

    python launch/results/gallery.py run                                    # model=tiny, three seeds, full fine-tuning
    python launch/results/gallery.py run --model smollm2 --source DIRECTORY # six losses with LoRA on SmolLM2-135M
    python launch/results/gallery.py table [--model smollm2]                # gallery.md and gallery.png next to the runs

The budget is config/experiment/gallery.yaml. The start is SFT, stopped early. The same command again skips finished runs and
resumes the rest; so does `table` with measurements. What is measured does not depend on the loss: both models are loaded by plain
transformers and read the same held-out pairs and prompts. A loss that trains no language model (reward, prm) has no place here,
nor has max_rl, whose rewards are from 0 up: those that pairs stand for are 1 and -1.
"""

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent), str(ROOT / "launch")]

import torch
from accuracy import answers
from gallery_table import Measured, draw, page
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from halos.data import arithmetic
from halos.errors import UserError
from halos.hashes import file_hash
from halos.report.read import first_overrides, read_runs
from halos.rollout.rewards import exact_match

PAIRS, PROBLEMS = {"tiny": 400, "smollm2": 100}, {"tiny": 200, "smollm2": 50}  # held-out ones
NEW_TOKENS, BATCH = 64, 50
SEEDS = "seed=0,1,2"
PAIRED = (
    "aot aot_unpaired apo_down apo_zero bco_pair cdpo cpo discopop dpo dpo_norm dpop exo f_dpo hinge ipo ld_dpo mpo nca orpo"
    " robust rpo simpo slic sppo wpo"
)
OTHERS = "bco kto sft dft csft"  # labels and demonstrations, made of the same pairs
ROLLOUTS = "cispo dapo dr_grpo grpo gspo opo ppo reinforce_plus_plus rloo sapo"  # pairs as rewards of 1 and -1
MIXTURE = "loss.parts={dpo: {weight: 1, beta: 0.1}, sft: {weight: 1}}"
ONLINE = ["online.loss=dpo", "online.steps=24", "online.eval_prompts=0", "online.sampler.max_new_tokens=24"]

# exp_name of a sweep -> its overrides; the names of losses are those of config/loss
SWEEPS = {
    "tiny": {
        "losses": [f"loss={','.join(f'{PAIRED} {OTHERS} {ROLLOUTS}'.split())}"],
        "humanline": ["loss=dpo,kto", "humanline=on"],
        "mixture": ["loss=mixture", MIXTURE],
        "gkd": ["loss=gkd", "reference.name_or_path=${output_root}/teacher/FINAL"],
        "online": ["loss=online", *ONLINE],  # DPO on pairs of fresh samples: as many steps and pairs as offline
        "online_humanline": ["loss=online", *ONLINE, "humanline=on"],
    },
    "smollm2": {
        "losses": ["loss=dpo,simpo,orpo,kto,bco"],
        "humanline": ["loss=dpo", "humanline=on"],
    },
}  # fmt: skip
STARTS = {
    "tiny": {"start": ["train.steps=100", "optim.lr=1e-3"], "teacher": ["train.steps=300", "optim.lr=1e-3"]},
    "smollm2": {"start": ["train.steps=8", "train.batch_size=16", "train.microbatch_size=4", "train.max_length=256"]},
}


def commands(model: str, root: Path, source: str | None) -> Iterator[tuple[Path | None, list[str]]]:
    """Yield the arguments of train.py for each stage, and the directory whose presence says that it is done, for single runs."""
    given = [f"model={model}", "data=arithmetic", f"output_root={root}"]
    own = [f"model.name_or_path={source}"] if source else []
    for name, overrides in STARTS[model].items():
        once = ["train.eval_every=null", "train.eval_at_start=false"]
        yield root / name / "FINAL", ["loss=sft", *given, *own, *overrides, *once, f"exp_name={name}"]
    experiment = ["experiment=gallery"] if model == "tiny" else ["experiment=gallery_smollm2", "peft=lora"]
    for name, overrides in SWEEPS[model].items():
        yield None, ["-m", *experiment, *overrides, SEEDS, *given, f"exp_name={name}"]


def run(model: str, root: Path, source: str | None) -> int:
    """Run every stage; return the status of the first that a signal stopped or that failed before any job, else 0."""
    worst = 0
    for done, arguments in commands(model, root, source):
        if done is not None:
            refuse_other_budget(done.parent, arguments)
            if done.is_dir():
                continue
        resume = done is not None and (done.parent / "config.yaml").is_file()
        command = [f"resume={done.parent}"] if resume and done is not None else arguments
        print("$ python train.py " + shlex.join(command), flush=True)
        status = subprocess.run([sys.executable, str(ROOT / "train.py"), *command], check=False).returncode
        if status and (done is not None or status == 75):
            return status
        worst = worst or status  # a loss that failed is reported, and the other sweeps run on
    return worst


def refuse_other_budget(directory: Path, arguments: list[str]) -> None:
    """Raises UserError for a run that other arguments began: it would pass for the start of these."""
    if (began := first_overrides(directory)) and began != arguments:
        asked, other = shlex.join(arguments), shlex.join(began)
        raise UserError(f"{directory} was trained by `{other}`, and not by `{asked}`: delete it, or give another --root")


def jobs(model: str) -> Iterator[tuple[str, int]]:
    """Yield the name in the table and the seed of each run that the sweeps make."""
    for overrides in SWEEPS[model].values():
        losses = overrides[0].removeprefix("loss=").split(",")
        for loss, seed in itertools.product(losses, SEEDS.removeprefix("seed=").split(",")):
            inner = next((word.partition("=")[2] for word in overrides if word.startswith("online.loss=")), None)
            modifier = "humanline " if "humanline=on" in overrides else ""
            yield f"{modifier}{loss} {inner}" if inner else f"{modifier}{loss}", int(seed)


def refuse_twice(rows: Sequence[Measured], root: Path) -> None:
    """Raises UserError for several runs of one loss and seed, which an interval would count as independent."""
    if twice := [key for key, count in Counter((row.name, row.seed) for row in rows).items() if count > 1]:
        names = "; ".join(f"{name}, seed {seed}" for name, seed in twice)
        raise UserError(f"there are several runs of a loss and seed below {root}, of which one may count: {names}")


def table(model: str, root: Path, output: Path) -> None:
    """Measure the runs that have finished and write gallery.md and gallery.png. Raises UserError where there is none."""
    start = root / "start" / "FINAL"
    if not start.is_dir():
        raise UserError(f"{start} is missing: `python launch/results/gallery.py run` makes it")
    records, skipped = read_runs([path for name in SWEEPS[model] if (path := root / name).is_dir()] or [root / "losses"])
    finished = [record for record in records if record.status == "finished"]
    unfinished = [f"{record.path.parent.name}/{record.label}: {record.status}" for record in records if record not in finished]
    begun = {(record.loss, record.config["seed"]) for record in records}
    unfinished += [f"{name}, seed {seed}: not begun" for name, seed in jobs(model) if (name, seed) not in begun]
    disable_progress_bar()  # of transformers, one for each model that is loaded
    started = measure(model, start, start, start.parent / "gallery.json")
    rows = [
        Measured(one.loss, one.config["seed"], measure(model, one.path / "FINAL", start, one.path / "gallery.json"))
        for one in tqdm(finished, desc="measuring", unit="run")
    ]
    refuse_twice(rows, root)
    output.mkdir(parents=True, exist_ok=True)
    text = page(rows, started, [*unfinished, *skipped], pairs=PAIRS[model], problems=PROBLEMS[model])
    (output / "gallery.md").write_text(text, encoding="utf-8")
    draw(rows, started, output / "gallery.png")
    print(text)


def measure(model: str, trained: Path, start: Path, kept: Path) -> dict[str, float]:
    """Metrics of `trained` against `start`, kept in a file in the run while both have the same weights; log-probs are sums over a
    completion, in nats.

    Implicit accuracy is the share of pairs whose chosen completion gained more log-prob than the rejected one, a tie counting
    half; ranking accuracy that of those whose chosen completion is the likelier; margin is the mean difference of the gains,
    drift the mean gain of the chosen completions; exact match is that of greedy answers.
    """
    pairs, problems = PAIRS[model], PROBLEMS[model]
    measured_of = [*(file_hash(each / "model.safetensors") for each in (trained, start)), pairs, problems, NEW_TOKENS]
    if kept.is_file() and (before := json.loads(kept.read_text()))["of"] == measured_of:
        return before["metrics"]
    rows = held_out(pairs)
    now = pair_logps(trained, rows)
    gain = now - at_start(start, pairs)
    asked = rows[:problems]
    texts = answers(str(trained), [row["prompt"] for row in asked], BATCH, NEW_TOKENS)
    right = [exact_match(text, {"solution": row["chosen"][0]["content"]}) for text, row in zip(texts, asked, strict=True)]
    metrics = {
        "implicit accuracy": share_above(gain[:, 0], gain[:, 1]),
        "ranking accuracy": share_above(now[:, 0], now[:, 1]),
        "margin": float((gain[:, 0] - gain[:, 1]).mean()),
        "drift of chosen": float(gain[:, 0].mean()),
        "exact match": sum(right) / len(right),
    }
    hidden = kept.with_name(f".{kept.name}")
    hidden.write_text(json.dumps({"of": measured_of, "metrics": metrics}))
    os.replace(hidden, kept)
    return metrics


@cache
def held_out(pairs: int) -> list[dict[str, Any]]:
    return list(itertools.islice(arithmetic.rows("eval"), pairs))


@cache
def at_start(start: Path, pairs: int) -> Tensor:
    return pair_logps(start, held_out(pairs))


def share_above(left: Tensor, right: Tensor) -> float:
    """The share of places where `left` is greater; a tie counts half."""
    return float(((left > right).double() + 0.5 * (left == right).double()).mean())


@torch.no_grad()
def pair_logps(directory: Path, rows: Sequence[dict[str, Any]]) -> Tensor:
    """(rows, 2) float64: log-probs of the chosen and the rejected completion, end token included."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    parts = [encoded(tokenizer, row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    sums = []
    for first in range(0, len(parts), BATCH):
        some = parts[first : first + BATCH]
        longest = max(len(ids) for ids, _ in some)
        ids = torch.tensor([ids + [ids[-1]] * (longest - len(ids)) for ids, _ in some])  # padded behind: causal, so never seen
        logps = model(input_ids=ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].double()
        sums += [logps[n, start - 1 : len(ids) - 1].sum() for n, (ids, start) in enumerate(some)]
    return torch.stack(sums).view(-1, 2)


def encoded(tokenizer: Any, prompt: list[dict[str, str]], completion: list[dict[str, str]]) -> tuple[list[int], int]:
    """Token ids up to the end token of the completion, and how many of them are the prompt's."""
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.apply_chat_template([*prompt, *completion], return_dict=True)["input_ids"]
    assert ids[: len(before)] == before, "the template renders the prompt otherwise with its completion"
    last = len(ids) - ids[::-1].index(tokenizer.eos_token_id)  # a template may add a line break behind it
    return ids[:last], len(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "table"])
    parser.add_argument("--model", choices=list(SWEEPS), default="tiny")
    parser.add_argument("--source", help="a directory or hub id of the model, instead of its default")
    parser.add_argument("--root", type=Path, help="of the runs; runs/gallery/MODEL")
    parser.add_argument("--output", type=Path, help="directory of gallery.md and gallery.png; that of the runs")
    given = parser.parse_args()
    root = given.root or Path("runs/gallery") / given.model
    try:
        if given.stage == "run":
            return run(given.model, root, given.source)
        table(given.model, root, given.output or root)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
