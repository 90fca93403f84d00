"""Which checkpoint a run goes on from: the newest that verifies, and why newer ones were passed over."""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halos import confined
from halos.checkpoint import commit, good, manifest
from halos.errors import UserError
from halos.hashes import short
from halos.rundir import ASIDE, RunDir

log = logging.getLogger(__name__)

SHARDED = "model-sharded"  # a whole model of which each process wrote its part; `export` makes one directory of it
MODELS = ("model", SHARDED)  # a whole model, as it was trained
STEP = re.compile(r"step-(\d{1,15})\Z")


@dataclass(frozen=True, slots=True)
class Found:
    """A whole checkpoint, or None, and one line for each that was passed over."""

    path: Path | None
    passed_over: list[str]


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    match = STEP.match(path.name)
    assert match, f"{path} is no checkpoint"
    return int(match[1])


def checkpoints(directory: Path) -> list[Path]:
    """All of them, whole or not, oldest first; hidden ones are none."""
    found = [path for path in directory.glob("step-*") if STEP.match(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def record(run: RunDir, checkpoint: Path | None) -> None:
    """Note outside checkpoints/ that this one has become durable, with the seal of its manifest; None: that the run begins again
    at step 0, since none was good. A disk that is full loses the note, not the run."""
    row: dict[str, Any] = {"step": 0, "checkpoint": None}
    if checkpoint is not None:
        listing = manifest.read(checkpoint)
        seal = None if isinstance(listing, manifest.Fault) else listing["seal"]
        row = {"step": step_of(checkpoint), "checkpoint": checkpoint.name, "manifest_seal": seal}
    try:
        run.commits.add(row)
    except OSError as error:
        log.warning("%s could not be written (%s): it lacks %s", run.commits.path, error, row)


def go_on(run: RunDir, asked: Path | None) -> Found:
    """What a resumed run goes on from, when the leftovers of dead saves are gone: one that was moved aside is back first. Raises
    UserError where there is nothing that it could go on from, and then touches no more than those."""
    refuse_newer(run.checkpoints)
    refuse_misplaced(run)
    commit.sweep(run.checkpoints)
    commit.sweep(run.path)
    return _choose(run, asked)


def look(run: RunDir, asked: Path | None) -> Found:
    """The same of what can be seen now, which is all but what a dead save has moved aside; touches nothing."""
    refuse_newer(run.checkpoints)
    refuse_misplaced(run)
    return _choose(run, asked)


def _choose(run: RunDir, asked: Path | None) -> Found:
    known = good.read(run)
    doubted = good.doubted(run)
    found = Found(exactly(asked), []) if asked else newest(run.checkpoints, doubted=doubted)
    if found.path is None and (not doubted or known.until >= 0):  # where none was ever good, step 0 is the last that was
        refuse_lost(run, found)
    return found


def refuse_lost(run: RunDir, found: Found) -> None:
    """Raises UserError where a run has committed checkpoints and none of them is whole: step 0 would throw its work away."""
    noted, known = run.commits.read(), good.read(run)
    steps = _since_the_beginning(_of_steps(noted.rows)) + [step_of(path) for path in checkpoints(run.checkpoints)]
    if not (steps or noted.fault) or any(run.checkpoints.glob(f"{commit.REPLACED}*")):  # the one that is moved aside comes back
        return
    why = f" ({'; '.join(found.passed_over)})" if found.passed_over else f": {run.checkpoints} holds none"
    saved = f"checkpoints up to step {max(steps)}" if steps else f"checkpoints, by {run.commits.path} ({noted.fault})"
    sound = "whole" if known.doubted_at is None else "whole and known to be good"
    aside = sorted(path for path in run.checkpoints.glob(f"{ASIDE}*/step-*") if not manifest.verify(path))
    whole = f" or move {aside[-1]} back into {run.checkpoints}," if aside else ""
    raise UserError(
        f"{run.path} has saved {saved}, and none of them is {sound}{why}. It does not begin again at step 0 by itself: bring one"
        f" back from a copy,{whole} or begin a new run (delete {run.path}, or another exp_name)"
    )


def _of_steps(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without what no run has written, whoever sealed it."""
    return [row for row in rows if type(row.get("step")) is int]


def _since_the_beginning(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Steps of the checkpoints that were noted since the run has last begun at step 0."""
    steps = list[int]()
    for row in rows:
        steps = [*steps, row["step"]] if row.get("checkpoint") is not None else []
    return steps


def refuse_misplaced(run: RunDir) -> None:
    """Raises UserError where somebody has put a checkpoint here that is none of this run, or renamed one."""
    settings = confined.parse_yaml(run.read_config(), str(run.config)) if run.config.is_file() else None
    settings = settings if isinstance(settings, dict) else {}
    sealed = _seals(_of_steps(run.commits.read().rows))
    for path in checkpoints(run.checkpoints):
        if why := _misplaced(path, settings, sealed.get(step_of(path))):
            raise UserError(f"{path} is not what this run saved there: {why}. Move it away")


def _seals(rows: Sequence[Mapping[str, Any]]) -> dict[int, str | None]:
    """By step, the seal of the manifest that was saved. Behind a step that is noted again, because the run went on from there,
    nothing is known: what it saves there next may become durable and not be noted."""
    seals = dict[int, str | None]()
    for row in rows:
        seals = {step: seal for step, seal in seals.items() if step < row["step"]}
        seals |= {row["step"]: row.get("manifest_seal")} if row.get("checkpoint") is not None else {}
    return seals


def _misplaced(path: Path, settings: Mapping[str, Any], seal: str | None) -> str | None:
    """Why a checkpoint is none of the run's. `seal` is that of the one that was saved under its name, where that is known."""
    listing = manifest.read(path)
    if isinstance(listing, manifest.Fault):
        return None  # damaged, and passed over as such
    if listing.get("step", step_of(path)) != step_of(path):
        return f"it was saved at step {listing['step']}"
    if seal is not None:
        return None if listing["seal"] == seal else f"it is sealed {short(listing['seal'])}, and what was saved was {short(seal)}"
    adapter = (settings.get("peft") or {}).get("name") == "lora"
    mine, other = (("adapter",), MODELS) if adapter else (MODELS, ("adapter",))
    there = [name for name in other if (path / name).is_dir()]
    if settings and there and not any((path / name).is_dir() for name in mine):
        return f"it holds {there[0]}/, and this run trains and saves {mine[0]}/"
    try:
        name = confined.load_object(path / "lineage.json", within=path)["runs"][-1]["config"]["exp_name"]
    except (UserError, LookupError, TypeError):
        return None
    return None if settings.get("exp_name") in (None, name) else f"it is of another run, {confined.one_line(str(name)[:80])}"


def refuse_newer(directory: Path) -> None:
    """Raises NewerFormatError where a later version of halos has saved here: nothing older is taken in its place."""
    for path in checkpoints(directory):
        manifest.read(path)


def newest(directory: Path, *, doubted: Collection[int] = ()) -> Found:
    """The newest checkpoint of `directory` whose every byte is what its manifest says, and which is none of the `doubted`."""
    passed_over = []
    for path in reversed(checkpoints(directory)):
        if step_of(path) in doubted:
            passed_over.append(f"{path.name} passed over: no step after it was finite, and so the run failed")
            continue
        faults = manifest.verify(path)
        if not faults:
            return Found(path, passed_over)
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        passed_over.append(f"{path.name} passed over: {faults[0]}{more}")
    return Found(None, passed_over)


def exactly(path: Path) -> Path:
    """The checkpoint that was asked for by name. Raises UserError where it is not whole."""
    faults = manifest.verify(path)
    if faults:
        raise UserError(f"{path} cannot be resumed from: {'; '.join(str(fault) for fault in faults[:3])}")
    return path


def score_of(path: Path, metric: str) -> float | None:
    """A checkpoint's held-out metric, or None where it has none."""
    score = metrics_of(path).get("eval", {}).get(metric)
    return score if isinstance(score, float) or type(score) is int else None


def metrics_of(path: Path) -> dict[str, Any]:
    """The metrics saved with a checkpoint, or nothing where they cannot be read."""
    try:
        metrics = confined.load_object(path / "metrics.json", within=path)
    except UserError:
        return {}
    return metrics if isinstance(metrics.get("eval", {}), dict) else {}
