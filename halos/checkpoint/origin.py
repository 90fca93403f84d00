"""What a run writes of itself into its saves: lineage.json, and FINAL's model card."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel

from halos import __version__
from halos.checkpoint import card, lineage
from halos.checkpoint.find import name_of
from halos.hooks.base import Run


def begin(run: Run) -> dict[str, Any]:
    """The chain up to this run. Raises UserError where a resumed adapter meets another base than it was trained on."""
    assert run.content is not None, "the first process has read what the run stands on"
    saved = run.directory.checkpoints / name_of(run.step)
    if run.step and isinstance(run.model, PeftModel):
        lineage.refuse_other_base(lineage.read(saved), run.base, str(saved))
    loss = run.config.loss["_target_"].split(".")[-2]
    facts = {"data": run.content.sources, "content": run.content.hashes}
    start = run.config.peft.init_from if run.config.peft.name == "lora" else None
    adapter = Path(start) if start is not None else None
    return lineage.begin(run.base, asdict(run.config), adapter=adapter, loss=loss, **facts, halos=__version__)


def leave(chain: Mapping[str, Any], run: Run, path: Path, *, final: bool) -> None:
    """lineage.json for the save at `path`, and for FINAL its card."""
    places = {"adapter": path / "adapter", "model": path if final else path / "model"}
    made = {kind: place for kind, place in places.items() if any(place.glob("*.safetensors"))}
    evaluations = [row for row in run.directory.read_metrics() if row.get("split") == "eval"]
    first = evaluations[0] if evaluations and evaluations[0]["step"] < run.step else None
    record = {"attempt": run.directory.next_attempt() - 1, "metrics": run.directory.metrics.seal(run.step)}
    whole = lineage.write(path, chain, made, step=run.step, before=first, metrics=run.last_eval, record=record)
    if final and not run.failure:
        card.write(path, whole, adapter="model" not in made, reward=run.reward, title=run.config.exp_name or path.name)
