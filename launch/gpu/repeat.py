"""The same run twice, and killed and resumed: equal bit for bit with train.deterministic."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu import rows
from gpu.place import Place, Result, Run

STEPS, KILLED_AT = 6, 5  # the last checkpoint before is that of step 4
FOR_FOUR = 40  # GiB of a card on which four of these runs, and other checks, fit side by side
SET = "train.deterministic=true"


def _words(place: Place) -> list[str]:
    """Full fine-tuning on rows of several hundred tokens: kernels split those into parts, whose order of summation may vary.

    The runs share the card, and of what is free `auto` might make other budgets for each.
    """
    made = rows.make("dpo-full", "small", place, steps=STEPS, batch_size=8, answers=True)
    return ["loss=dpo", f"model.name_or_path={place.model('small')}", f"data.train=['{made.path}']", "data.eval=[]",
            f"train.steps={STEPS}", "train.batch_size=8", f"train.max_length={rows.LONGEST}", "train.microbatch_tokens=2048",
            "checkpoint.every=2", "checkpoint.keep_last=1", "plugins=[gpu]",
            "+hooks.kill={_target_: gpu.hooks.Kill}"]  # fmt: skip


def _weights(run: Path) -> str | None:
    files = sorted((run / "FINAL").glob("*.safetensors"))
    if not files:
        return None
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def _steps(place: Place, name: str) -> dict[int, tuple[Any, Any]]:
    """Loss and gradient norm by step; of steps that were repeated after a resume the last."""
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in place.metrics(name)}


def _compare(place: Place, one: str, other: str) -> tuple[bool, str]:
    a, b = _steps(place, one), _steps(place, other)
    weights = [_weights(place.run(name)) for name in (one, other)]
    if weights[0] is not None and weights[0] == weights[1] and a == b:
        return True, f"{len(a)} steps and all weights equal"
    first = next((step for step in sorted(a | b) if a.get(step) != b.get(step)), None)
    return False, f"the first step that differs is {first}" if first else "weights differ, losses do not"


def deterministic(name: str, place: Place) -> Result:
    """Two runs; where there is time and room, also two without the key, for the record."""
    words, roomy = _words(place), not place.quick and place.card.get("memory_gib", 0) >= FOR_FOUR
    plain = ["plain-1", "plain-2"] if roomy else []
    started = {"same-1": [*words, SET], "same-2": [*words, SET], **dict.fromkeys(plain, words)}
    with ThreadPoolExecutor(len(started)) as pool:
        done: dict[str, Run] = dict(zip(started, pool.map(lambda run: place.train(run, *started[run]), started), strict=True))
    for run in ("same-1", "same-2"):
        if done[run].returncode:
            return Result.crash(done[run])
    good, figure = _compare(place, "same-1", "same-2")
    without = None
    if plain:
        without = _compare(place, *plain)[1] if not any(done[run].returncode for run in plain) else "failed"
        figure += f"; without the key: {without}"
    return Result.of(good, figure, without=without)


def resume(name: str, place: Place) -> Result:
    """The run of `deterministic` again, killed between two checkpoints and resumed."""
    killed = place.train("killed", *_words(place), SET, more={"GPU_SUITE_KILL_AT": str(KILLED_AT)})
    if killed.returncode != -9 or max(_steps(place, "killed"), default=0) < KILLED_AT - 1:
        return Result.crash(killed, "it was not killed as planned: ")
    resumed = place.resume("killed", "plugins=[gpu]")
    if resumed.returncode:
        return Result.crash(resumed, "the resume: ")
    good, figure = _compare(place, "same-1", "killed")
    return Result.of(good, f"killed after step {KILLED_AT}, resumed: {figure}")
