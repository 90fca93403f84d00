"""Which checkpoints are known to be good: a step was finite with their weights. Recorded outside of what their manifests seal."""

import json
from dataclasses import asdict, dataclass

from halos import confined
from halos.confined import UnreadableError
from halos.rundir import RunDir

NAME = "good.json"


@dataclass(frozen=True, slots=True)
class Good:
    """`until`: the newest checkpoint, and with it all before, that is known to be good; -1 where none is.

    `doubted_at`: the step at which the run failed since nothing was finite any more. Checkpoints after `until` are then doubted.
    """

    until: int = -1
    doubted_at: int | None = None


def read(run: RunDir) -> Good:
    """As of a run that knows nothing yet, where there is no record that can be read."""
    try:
        record = confined.load_object(run.path / NAME, within=run.path)
    except UnreadableError:
        return Good()
    until, doubted_at = record.get("until"), record.get("doubted_at")
    return Good(until, doubted_at) if isinstance(until, int) and isinstance(doubted_at, int | None) else Good()


def write(run: RunDir, good: Good) -> None:
    if good != read(run):
        confined.write_whole(run.path / NAME, json.dumps(asdict(good)) + "\n", within=run.path)


def unknown(run: RunDir) -> list[int]:
    """Steps of the checkpoints that are not known to be good."""
    until = read(run).until
    return [step for step in run.saves() if step > until]


def doubted(run: RunDir) -> list[int]:
    """Steps of the checkpoints that a resume passes over."""
    return unknown(run) if read(run).doubted_at is not None else []
