"""Select the checkpoint that a run resumes from: the newest that verifies. Newer ones are passed over, each with a reason."""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halos import confined
from halos.checkpoint import commit, known_good, manifest
from halos.errors import UserError
from halos.hashes import short
from halos.rundir import SUPERSEDED, RunDir

log = logging.getLogger(__name__)

SHARDED = "model-sharded"  # all of a model's weights, written by each rank as its shards; `export` consolidates them
MODELS = ("model", SHARDED)  # directories of a model that was trained in full
STEP = re.compile(r"step-(\d{1,15})\Z")


@dataclass(frozen=True, slots=True)
class Selection:
    """The checkpoint to resume from, or None, and one line for each that was passed over."""

    path: Path | None
    passed_over: list[str]


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    match = STEP.match(path.name)
    assert match, f"{path} is no checkpoint"
    return int(match[1])


def checkpoints(directory: Path) -> list[Path]:
    """Return all checkpoints of `directory`, whole or not, oldest first. Hidden directories do not count."""
    paths = [path for path in directory.glob("step-*") if STEP.match(path.name) and path.is_dir()]
    return sorted(paths, key=step_of)


def record_commit(run: RunDir, checkpoint: Path | None) -> None:
    """Record outside checkpoints/ that `checkpoint` is durable, with the seal of its manifest. None records that the run restarts
    at step 0 because no checkpoint was good. A full disk costs this record, not the run."""
    row: dict[str, Any] = {"step": 0, "checkpoint": None}
    if checkpoint is not None:
        listing = manifest.read(checkpoint)
        seal = None if isinstance(listing, manifest.Fault) else listing["seal"]
        row = {"step": step_of(checkpoint), "checkpoint": checkpoint.name, "manifest_seal": seal}
    try:
        run.commits.add(row)
    except OSError as error:
        log.warning("%s could not be written (%s): it lacks %s", run.commits.path, error, row)


def select_checkpoint(run: RunDir, requested: Path | None) -> Selection:
    """Remove the leftovers of interrupted saves, put back what they moved aside, then return the checkpoint to resume from,
    or none where the run committed none, or failed before one was known to be good. Raises UserError where all that it committed
    are lost or damaged; nothing but those leftovers is touched then."""
    refuse_newer(run.checkpoints)
    refuse_misplaced(run)
    commit.remove_leftovers(run.checkpoints)
    commit.remove_leftovers(run.path)
    return _select(run, requested)


def preview_selection(run: RunDir, requested: Path | None) -> Selection:
    """`select_checkpoint` without touching anything; a checkpoint that an interrupted save moved aside is not seen."""
    refuse_newer(run.checkpoints)
    refuse_misplaced(run)
    return _select(run, requested)


def _select(run: RunDir, requested: Path | None) -> Selection:
    known = known_good.read(run)
    doubted = known_good.doubted(run)
    selection = Selection(require_whole(requested), []) if requested else newest(run.checkpoints, doubted=doubted)
    if selection.path is None and (not doubted or known.until >= 0):  # where no checkpoint was ever good, step 0 was
        refuse_lost(run, selection)
    return selection


def refuse_lost(run: RunDir, selection: Selection) -> None:
    """Raises UserError where a run committed checkpoints and none of them is whole: starting at step 0 would discard its work."""
    committed, known = run.commits.read(), known_good.read(run)
    steps = _steps_since_restart(_with_step(committed.rows)) + [step_of(path) for path in checkpoints(run.checkpoints)]
    if not (steps or committed.fault) or any(run.checkpoints.glob(f"{commit.REPLACED}*")):  # one that was moved aside comes back
        return
    why = f" ({'; '.join(selection.passed_over)})" if selection.passed_over else f": {run.checkpoints} holds none"
    saved = f"checkpoints up to step {max(steps)}" if steps else f"checkpoints, by {run.commits.path} ({committed.fault})"
    sound = "whole" if known.doubted_at is None else "whole and known to be good"
    aside = sorted(path for path in run.checkpoints.glob(f"{SUPERSEDED}*/step-*") if not manifest.verify(path))
    or_move = f" or move {aside[-1]} back into {run.checkpoints}," if aside else ""
    raise UserError(
        f"{run.path} has saved {saved}, and none of them is {sound}{why}. It does not restart at step 0 by itself: restore"
        f" one from a copy,{or_move} or start a new run (delete {run.path}, or choose another exp_name)"
    )


def _with_step(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Drop rows without an integer step: no run writes those, even where they are sealed."""
    return [row for row in rows if type(row.get("step")) is int]


def _steps_since_restart(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Steps of the checkpoints that were recorded since the run last started at step 0."""
    steps = list[int]()
    for row in rows:
        steps = [*steps, row["step"]] if row.get("checkpoint") is not None else []
    return steps


def refuse_misplaced(run: RunDir) -> None:
    """Raises UserError where somebody has put a checkpoint of another run here, or renamed one."""
    settings = confined.parse_yaml(run.read_config(), str(run.config)) if run.config.is_file() else None
    settings = settings if isinstance(settings, dict) else {}
    sealed = _seals(_with_step(run.commits.read().rows))
    for path in checkpoints(run.checkpoints):
        if why := _misplaced(path, settings, sealed.get(step_of(path))):
            raise UserError(f"{path} is not what this run saved there: {why}. Move it away")


def _seals(rows: Sequence[Mapping[str, Any]]) -> dict[int, str | None]:
    """Return each step's manifest seal. A step that is recorded again, because the run resumed from it, drops all later ones:
    what the run saves there next may become durable without being recorded."""
    seals = dict[int, str | None]()
    for row in rows:
        seals = {step: seal for step, seal in seals.items() if step < row["step"]}
        seals |= {row["step"]: row.get("manifest_seal")} if row.get("checkpoint") is not None else {}
    return seals


def _misplaced(path: Path, settings: Mapping[str, Any], seal: str | None) -> str | None:
    """Return why a checkpoint does not belong to the run, or None. `seal`: of the checkpoint saved under this name, if known."""
    listing = manifest.read(path)
    if isinstance(listing, manifest.Fault):
        return None  # it is passed over as damaged
    if listing.get("step", step_of(path)) != step_of(path):
        return f"it was saved at step {listing['step']}"
    if seal is not None:
        return None if listing["seal"] == seal else f"it is sealed {short(listing['seal'])}, and what was saved was {short(seal)}"
    adapter = (settings.get("peft") or {}).get("name") == "lora"
    mine, other = (("adapter",), MODELS) if adapter else (MODELS, ("adapter",))
    present = [name for name in other if (path / name).is_dir()]
    if settings and present and not any((path / name).is_dir() for name in mine):
        return f"it holds {present[0]}/, and this run trains and saves {mine[0]}/"
    try:
        name = confined.load_object(path / "lineage.json", within=path)["runs"][-1]["config"]["exp_name"]
    except (UserError, LookupError, TypeError):
        return None
    return None if settings.get("exp_name") in (None, name) else f"it is of another run, {confined.one_line(str(name)[:80])}"


def refuse_newer(directory: Path) -> None:
    """Raises NewerFormatError where a later version of halos saved here: no older checkpoint is taken instead."""
    for path in checkpoints(directory):
        manifest.read(path)


def newest(directory: Path, *, doubted: Collection[int] = ()) -> Selection:
    """Return the newest checkpoint of `directory` whose every byte matches its manifest, skipping the `doubted` steps."""
    passed_over = []
    for path in reversed(checkpoints(directory)):
        if step_of(path) in doubted:
            passed_over.append(f"{path.name} passed over: no step after it was finite, and so the run failed")
            continue
        faults = manifest.verify(path)
        if not faults:
            return Selection(path, passed_over)
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        passed_over.append(f"{path.name} passed over: {faults[0]}{more}")
    return Selection(None, passed_over)


def require_whole(path: Path) -> Path:
    """Return a checkpoint that was requested by name. Raises UserError where it is not whole."""
    faults = manifest.verify(path)
    if faults:
        raise UserError(f"{path} cannot be resumed from: {'; '.join(str(fault) for fault in faults[:3])}")
    return path


def refuse_older_final(run: Path) -> None:
    """Raises UserError where a run has gone on since it wrote FINAL, and has a newer checkpoint."""
    listing, saved = manifest.read(run / "FINAL"), checkpoints(run / "checkpoints")
    step = None if isinstance(listing, manifest.Fault) else listing.get("step")
    if saved and type(step) is int and step < step_of(saved[-1]):
        raise UserError(f"{run} has gone on since its FINAL, which is of step {step}: name {run / 'FINAL'}, or {saved[-1]}")


def score_of(path: Path, metric: str, evaluations: Mapping[int, Mapping[str, Any]]) -> float | None:
    """Return a checkpoint's evaluation metric, or None where it has none: of its own step where that is among `evaluations`, else
    what was saved with it."""
    score = evaluations.get(step_of(path), metrics_of(path).get("eval", {})).get(metric)
    return score if isinstance(score, float) or type(score) is int else None


def metrics_of(path: Path) -> dict[str, Any]:
    """Return the metrics saved with a checkpoint, empty where they cannot be read."""
    try:
        metrics = confined.load_object(path / "metrics.json", within=path)
    except UserError:
        return {}
    return metrics if isinstance(metrics.get("eval", {}), dict) else {}
