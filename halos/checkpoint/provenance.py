"""Where a run's weights come from, written into its checkpoints and FINAL: lineage.json, and FINAL's model card."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel

from halos import __version__, confined
from halos.checkpoint import card, lineage, manifest
from halos.checkpoint.select import name_of, step_of
from halos.config import run_config
from halos.hooks.base import Run


def begin(run: Run) -> dict[str, Any]:
    """Return the lineage up to this run. Raises UserError where a resumed adapter was trained on another base."""
    assert run.content is not None, "rank 0 has hashed what the run depends on"
    saved = run.directory.checkpoints / name_of(run.step)
    if run.step and isinstance(run.model, PeftModel):
        lineage.refuse_other_weights(lineage.read(saved), run.base, str(saved))  # the resume has compared its config.json
    loss = run.config.loss["_target_"].split(".")[-2]
    facts = {"data": run.content.sources, "content": run.content.hashes, **_changes(run)}
    start = run.config.peft.init_from if run.config.peft.name == "lora" else None
    adapter = Path(start) if start is not None else None
    return lineage.begin(run.base, asdict(run.config), adapter=adapter, loss=loss, **facts, halos=__version__)


def write(chain: Mapping[str, Any], run: Run, path: Path, *, final: bool) -> None:
    """Write lineage.json of the checkpoint or FINAL at `path`, also into its adapter, and FINAL's model card."""
    directories = {"adapter": path / "adapter", "model": path if final else path / "model"}
    weights = {kind: directory for kind, directory in directories.items() if any(directory.glob("*.safetensors"))}
    evaluations = [row for row in run.directory.read_metrics() if row.get("split") == "eval"]
    first = evaluations[0] if evaluations and evaluations[0]["step"] < run.step else None
    record = {"attempt": run.directory.next_attempt() - 1, "metrics": run.directory.metrics.seal(run.step)}
    full = lineage.write(path, chain, weights, step=run.step, before=first, metrics=run.last_eval, record=record)
    if adapter := weights.get("adapter"):  # so that a copy of it alone is identified and checked too
        shutil.copy(path / lineage.NAME, adapter)
        (adapter / manifest.NAME).write_text(manifest.describe(adapter, {"step": run.step}))
    if final and not run.failure:
        card.write(path, full, adapter="model" not in weights, reward=run.reward, title=run.config.exp_name or path.name)


def _changes(run: Run) -> dict[str, Any]:
    """Changes by resumes on the line of training that led here, oldest first: of each from which checkpoint on, and its keys with
    what they were before on that line and became. The configuration of a lineage is that of the last."""
    line: dict[int, dict[str, Any]] = {}  # by the step that an attempt resumed from, in ascending order
    for name, text in run.directory.read_attempts().items():
        start = confined.parse_yaml(text, name).get("resumed_from")
        step = step_of(Path(start)) if str(start).startswith("checkpoints/") else 0
        behind = [line.pop(later)["keys"] for later in sorted(line) if later >= step]
        keys: dict[str, Any] = {}
        for changed in [*behind, run_config.changed_keys(text)]:  # a resume keeps the settings of attempts that it goes behind
            for key, (old, new) in changed.items():
                keys[key] = [keys[key][0] if key in keys else old, new]
        line[step] = {"from": start, "keys": {key: values for key, values in keys.items() if values[0] != values[1]}}
    changes = [change for change in line.values() if change["keys"]]
    return {"changed": changes} if changes else {}
