"""The verdict on a run's forward: proved on a small copy, cached under everything it depends on, and reported in one line."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from halos import confined
from halos.errors import UserError
from halos.hashes import source_hash
from halos.logps import miniature
from halos.logps.attention import PREFIX
from halos.logps.plan import ForwardPlan, plan_for
from halos.prove import checks
from halos.prove.small_copy import Check, ForwardSpec
from halos.versions import versions

CODE = (
    "logps",
    "prove",
    "models/adapter.py",
    "models/targets.py",
    "data/collate.py",
    "types.py",
    "sequences.py",
)  # source files a verdict depends on


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run computes its log-probs or scores, and the checks that prove it; none where nothing was proved."""

    plan: ForwardPlan
    checks: Sequence[Check]

    @property
    def line(self) -> str:
        way = f"one row at a time, since rows cannot be packed: {self.plan.why}"
        if self.plan.is_packed:
            way = f"packed rows, model.attention={str(self.plan.attention).removeprefix(PREFIX)}"
        if not self.checks:
            return f"{way}; NOT PROVED (train.prove=off)"
        first = self.checks[0]
        return f"{way}; on a small copy {first.what} within {first.error:.0e} of the model's own, {len(self.checks)} checks hold"

    def report(self) -> dict[str, Any]:
        return {"plan": asdict(self.plan), "copy": [asdict(check) for check in self.checks]}


def verdict_on(spec: ForwardSpec, cache_dir: Path, *, again: bool) -> Verdict:
    """The verdict on the small copy, from the cache unless `again`. Raises UserError where a check does not hold."""
    plan = plan_for(spec.config, reward=spec.reward, attention=spec.attention, longest=spec.longest)
    path = cache_dir / "forward" / f"{key_of(spec)}.json"
    results = None if again else _cached(path)
    if results is None:
        try:
            _, results = checks.prove(spec)
        except UserError:
            raise
        except Exception as error:  # whatever an architecture raises
            raise UserError(
                f"the forward of {spec.config.model_type} could not be proved on a small copy of it: {type(error).__name__}:"
                f" {(str(error).splitlines() or [''])[0]}. train.prove=off trains without a proof"
            ) from error
        refuse_failed(results, f"a small random copy of {spec.config.model_type}")
        path.parent.mkdir(parents=True, exist_ok=True)
        confined.write_whole(path, json.dumps([asdict(check) for check in results]))
    return Verdict(plan, results)


def refuse_failed(results: Sequence[Check], where: str) -> None:
    """Raises UserError for the first check that does not hold."""
    if wrong := [check for check in results if not check.holds]:
        raise UserError(
            f"this run's numbers are not the model's own: {wrong[0].what} {wrong[0].error:.1e} off on {where}, where"
            f" {wrong[0].allowed:.1e} is rounding. Nothing was trained; another model.attention or transformers may be right, and"
            " train.prove=off trains all the same"
        )


def key_of(spec: ForwardSpec) -> str:
    """A hash of everything that the verdict depends on: settings, device, versions, and the code that is proved."""
    small = miniature.small_config(spec.config, longest=spec.longest)
    settings = {name: str(value) for name, value in asdict(spec).items() if name != "config"}
    name = torch.cuda.get_device_name(spec.device) if spec.device.type == "cuda" else ""
    text = json.dumps([miniature.key_of(small), settings, name, versions()["packages"], source_hash(CODE)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _cached(path: Path) -> list[Check] | None:
    """The cached checks; None where they are missing, damaged or failed, and are to be proved again."""
    try:
        results = [
            Check(str(each["what"]), float(each["error"]), float(each["allowed"])) for each in json.loads(path.read_text())
        ]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return results if results and all(check.holds for check in results) else None
