"""From which weights samples of a round come, what scored them, and on which rows its training was: compared by content."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from halos.checkpoint import lineage
from halos.config import run_config
from halos.data.sources import content_hash
from halos.models.locate import locate
from halos.online.records import read_meta
from halos.rundir import RunDir


def sampled_from(samples: Path, policy: str, revision: str | None, cache: Path) -> bool:
    """Whether samples come from a policy's weights, compared by hash; for a server's samples, where no hash is known, by name."""
    request = read_meta(samples).get("request")
    if not isinstance(request, dict):
        return False
    weights = request.get("model_sha256")
    if weights is None:
        return request.get("model") == policy
    return weights == lineage.identity(locate(policy, revision, cache), cache)


def scored_alike(one: Path, other: Path, recorded_since: Collection[str]) -> bool:
    """Whether the scores in two files were asked of one scorer, of other samples; True where one does not record what was asked.
    Of `recorded_since`, which older files lack, only what both have is compared."""
    first, second = (read_meta(path).get("request") for path in (one, other))
    if not isinstance(first, dict) or not isinstance(second, dict):
        return True
    names = (first.keys() | second.keys()) - {"samples"}
    return all(
        first.get(key) == second.get(key) or (key in recorded_since and (key not in first or key not in second)) for key in names
    )


def trained_on(run: RunDir, rows: Path) -> bool:
    """Whether a training run used the rows of a file; True where the run is too old to have recorded them."""
    recorded = run_config.recorded_content(run.read_attempts(), str(run.path))
    return recorded is None or [each.get("hash") for each in recorded.sources["train"]] == [content_hash(str(rows), "train")]
