"""good.json: the checkpoints known to be good, since a later step was finite. Their manifests do not seal it."""

import json
from dataclasses import asdict, dataclass

from halos import confined
from halos.confined import UnreadableError
from halos.rundir import RunDir

NAME = "good.json"


@dataclass(frozen=True, slots=True)
class KnownGood:
    """`until`: the step of the newest checkpoint known to be good; so are all before it. -1: none is.

    `doubted_at`: the step at which the run failed because its gradients, its last weights or their outputs were not finite, or
    it skipped every step. Later checkpoints than `until` are then doubted.
    """

    until: int = -1
    doubted_at: int | None = None


def read(run: RunDir) -> KnownGood:
    """Return the record; where none can be read, that of a run that has just started."""
    try:
        record = confined.load_object(run.path / NAME, within=run.path)
    except UnreadableError:
        return KnownGood()
    until, doubted_at = record.get("until"), record.get("doubted_at")
    return KnownGood(until, doubted_at) if isinstance(until, int) and isinstance(doubted_at, int | None) else KnownGood()


def write(run: RunDir, known: KnownGood) -> None:
    if known != read(run):
        confined.write_whole(run.path / NAME, json.dumps(asdict(known)) + "\n", within=run.path)


def not_known_good(run: RunDir) -> list[int]:
    """Return the steps of the checkpoints that are not known to be good."""
    until = read(run).until
    return [step for step in run.checkpoints_by_step() if step > until]


def doubted(run: RunDir) -> list[int]:
    """Return the steps of the checkpoints that a resume passes over."""
    return not_known_good(run) if read(run).doubted_at is not None else []
