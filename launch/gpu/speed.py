"""Tokens per second, MFU on needed tokens, memory and synchronisations of runs that are started with the public command."""

import json
import time
from collections.abc import Sequence
from typing import Any

from gpu import rows
from gpu.hooks import LEAST, WARM_UP
from gpu.place import Place, Result

STEPS = WARM_UP + 8
PAIRS = {"small": 32, "1.5b": 32, "8b": 16}  # a step
SECONDS = 25.0  # of steps, after which a run ends early
MUST = {"speed-1.5b-full": 0.30, "speed-8b-lora": 0.35}  # MFU on the cards below
JUDGED = ("H100", "H200")
OPTIONS = {"compiled": "train.compile=true", "cast": "train.working_weights=step"}
SYNCHRONISATIONS = 1  # of a step: the gradient norm's

Record = dict[str, Any]


def check(name: str, place: Place) -> Result:
    """The run `speed-MODEL-full` or `speed-MODEL-lora`: DPO on pairs with the lengths of answers; with a key of OPTIONS."""
    _, model, kind, *options = name.split("-")
    batch, steps = (PAIRS[model], STEPS) if place.cuda else (4, WARM_UP + 1 + LEAST)
    measured = _measure(f"dpo-{kind}", model, place, name, batch=batch, steps=steps, options=options)
    if isinstance(measured, Result):
        return measured
    found = figures(measured, place.card["peak"])
    must = MUST.get(name) if any(card in place.card["name"] for card in JUDGED) else None
    return Result.of(must is None or found["mfu"] >= must, describe(found), **found)


def syncs(name: str, place: Place) -> Result:
    """How often the host waits for the device in a step, by the lines of the product that do."""
    places: dict[str, dict[str, int]] = {}
    for workload in ("dpo-lora",) if place.quick else ("dpo-lora", "sft-full"):
        measured = _measure(workload, "small", place, f"{name}-{workload}", batch=8, steps=WARM_UP + 1 + LEAST)
        if isinstance(measured, Result):
            return measured
        places[workload] = measured["synchronisations"]
    if not place.cuda:
        return Result("skipped", "the runs finished; only a card can be waited for", {"places": places})
    counts = {workload: sum(found.values()) for workload, found in places.items()}
    lines = sorted({line for found in places.values() for line in found})
    figure = ", ".join(f"{workload} {count}" for workload, count in counts.items())
    return Result.of(max(counts.values()) <= SYNCHRONISATIONS, f"{figure}: {' '.join(lines)}"[:300], places=places)


def _measure(
    workload: str, model: str, place: Place, name: str, *, batch: int, steps: int, options: Sequence[str] = ()
) -> Record | Result:
    """Run a workload with the hook that measures; its record, with what is known of the rows."""
    made = rows.make(workload, model, place, steps=steps, batch_size=batch, answers=True)
    loss, kind = workload.split("-")
    output = place.run(name).with_suffix(".measured")
    output.parent.mkdir(parents=True, exist_ok=True)
    hook = f"+hooks.measure={{_target_: gpu.hooks.Measure, output: '{output}', seconds: {SECONDS}}}"
    began = time.time()
    done = place.train(
        name, f"loss={loss}", f"model.name_or_path={place.model(model)}", f"peft={'lora' if kind == 'lora' else 'none'}",
        f"data.train=['{made.path}']", "data.eval=[]", f"train.steps={steps}", f"train.batch_size={made.batch_size}",
        f"train.max_length={rows.LONGEST}", "optim.lr=1e-6", "schedule=constant", "checkpoint.every=null",
        "checkpoint.merge_lora=false", "plugins=[gpu]", hook, *map(OPTIONS.__getitem__, options),
    )  # fmt: skip
    if done.returncode or not output.is_file():
        return Result.crash(done)
    record = json.loads(output.read_text())
    return {**record, "row_tokens": made.tokens, "row_flops": made.flops, "whole_s": time.time() - began}


def figures(record: Record, peak: float) -> Record:
    """What a record says. Useful tokens are those of the prompt and the completion of every row, whatever is computed; needed
    FLOPs compute a prompt once for its pair. What was computed before the first step belongs to all rows alike."""
    steps, tokens = record["steps"], sum(step["tokens"] for step in record["steps"])
    seconds = sum(step["seconds"] for step in steps) + record["prepared_s"] * tokens / record["row_tokens"]
    rate, above = tokens / seconds, record["peak_mib"] - record["loaded_mib"]
    return {
        "tokens_per_s": rate, "mfu": rate * record["row_flops"] / record["row_tokens"] / peak, "peak_flops_per_s": peak,
        "seconds_a_step": seconds / len(steps), "tokens_a_step": tokens / len(steps), "peak_gib": record["peak_mib"] / 1024,
        "above_model_gib": above / 1024, "reserved_gib": record["reserved_mib"] / 1024,
        "synchronisations": sum(record["synchronisations"].values()), "record": record,
    }  # fmt: skip


def describe(found: Record) -> str:
    memory = f"peak {found['peak_gib']:.1f} GiB ({found['above_model_gib']:.1f} above the model)"
    step = f"{found['seconds_a_step']:.2f} s a step of {found['tokens_a_step']:,.0f} tokens"
    step += f" in micro-batches of {found['record']['microbatch_tokens']}"
    return (
        f"{found['tokens_per_s']:,.0f} tokens/s, MFU {found['mfu']:.1%}, {step}, {memory},"
        f" {found['synchronisations']} synchronisations a step"
    )
