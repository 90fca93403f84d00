"""lineage.json: the chain of runs that trained a model, from the first base's weights on.

A run copies the chain of the model that it starts from and appends itself: its configuration, the hashes of its base and data,
and its result. Each checkpoint carries it, so that an adapter identifies its base by content and not by path.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos import confined
from halos.errors import UserError
from halos.hashes import file_hashes
from halos.merge.safetensors_io import weight_files
from halos.models.content_hashes import CONFIG, changed_settings, config_hashes, settings_of
from halos.redaction import redact

NAME = "lineage.json"
FORMAT = 1
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def hashes(directory: Path, cache: Path | None = None) -> dict[str, str]:
    """Return the SHA-256 of each weight file of a model or adapter; with a `cache` (a cache_dir) each is read once."""
    return file_hashes(weight_files(directory), cache)


def identity(directory: Path, cache: Path | None = None) -> str:
    """Return one hash of a model's or adapter's weights: over the sorted hashes of its files, whatever their names."""
    return hashlib.sha256("\n".join(sorted(hashes(directory, cache).values())).encode()).hexdigest()


def read(directory: Path) -> dict[str, Any] | None:
    """Return the lineage that was saved with a model, or None where it has none."""
    path = directory / NAME
    if not path.is_file():
        return None
    lineage = confined.load_object(path)
    if lineage.get("format") != FORMAT or not _fits(lineage.get("runs"), [RUN]):
        raise UserError(f"{path} is no lineage of format {FORMAT}")
    return lineage


# the entries of a run that the code reads; the others are only shown
RUN: dict[str, Any] = {
    "base": {"name": str, "sha256": str}, "loss": str, "result": {},
    "config": {"model": {}, "train": {}, "optim": {}, "schedule": {}, "peft": {}, "loss": {}}, "data": {},
}  # fmt: skip


def _fits(value: Any, shape: Any) -> bool:
    """Whether a value has the keys and types of `shape`, in which a list stands for a non-empty list of its element."""
    if isinstance(shape, list):
        return isinstance(value, list) and bool(value) and all(_fits(each, shape[0]) for each in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(_fits(value.get(name), kind) for name, kind in shape.items())
    return isinstance(value, shape)


def of_adapter(directory: Path) -> dict[str, Any] | None:
    """Return the lineage of an adapter, from its directory or, in a checkpoint of an older version, from the directory above."""
    directory = directory.resolve()
    return read(directory) or read(directory.parent)


def begin(base: Path, config: Mapping[str, Any], *, adapter: Path | None = None, **facts: Any) -> dict[str, Any]:
    """Return the lineage of a run that starts from `base`, or from an `adapter` on it; `facts` are added to the run's entry."""
    before, weights, model = of_adapter(adapter) if adapter else read(base), identity(base), config["model"]
    origin: dict[str, Any] = {"name": model["name_or_path"], "revision": model["revision"], "sha256": weights}
    if (base / CONFIG).is_file():
        origin["config"] = settings_of(base / CONFIG)
    start = {} if adapter is None else {"adapter": {"path": str(adapter), "sha256": identity(adapter)}}
    kind, identity_now = ("model", weights) if adapter is None else ("adapter", start["adapter"]["sha256"])
    if before is not None and before["runs"][-1]["result"].get(kind) != identity_now:
        origin["changed"] = "these are not the weights that its lineage ends with"
    run = {"base": origin, **start, **facts, "config": config, "result": {}}
    lineage = {"format": FORMAT, "runs": [*(before["runs"] if before else []), run]}
    return json.loads(redact(json.dumps(lineage, default=str)))


LOCAL = ("cache_dir", "output_root", "run_dir", "resume")  # keys of a configuration that hold paths of one machine


def public(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """Return a lineage for others: without paths of this machine but those of base and data, whose home directory becomes ~."""
    runs = [
        {**run, "config": {key: value for key, value in run["config"].items() if key not in LOCAL}} for run in lineage["runs"]
    ]
    text = redact(json.dumps({**lineage, "runs": runs}))  # a run of an earlier version may have recorded a password
    home = json.dumps(str(Path.home()))[1:-1]
    return json.loads(text.replace(f'"{home}/', '"~/') if len(Path.home().parts) > 1 else text)


def write(directory: Path, lineage: Mapping[str, Any], weights: Mapping[str, Path], **facts: Any) -> dict[str, Any]:
    """Write lineage.json: the last run's result are `facts` and the hashes of `weights` (model, adapter). Return the lineage."""
    result = {**facts, **{kind: identity(path) for kind, path in weights.items()}}
    full = {**lineage, "runs": [*lineage["runs"][:-1], {**lineage["runs"][-1], "result": result}]}
    (directory / NAME).write_text(json.dumps(full, indent=1))
    return full


def refuse_other_base(lineage: Mapping[str, Any] | None, base: Path, what: str, cache: Path | None = None) -> None:
    """Raises UserError where `base` does not have the weights and the config.json that `what` was trained on."""
    refuse_other_weights(lineage, base, what, cache)
    if lineage is None:
        return
    run, path = lineage["runs"][-1], base / CONFIG
    recorded, content = run["base"].get("config"), run.get("content")
    changes = changed_settings(recorded, path) if isinstance(recorded, dict) else []
    if not isinstance(recorded, dict) and isinstance(content, dict):  # an older run recorded no more than the file's hash
        now = config_hashes("model", base, (CONFIG,))
        changes = [f"{key} has another hash" for key, value in now.items() if content.get(key) not in (None, value)]
    if changes:
        more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
        raise UserError(
            f"{what} was trained on {run['base']['name']}, whose config.json {path} differs from now: {changes[0]}{more}."
            " Restore the file, or give the base as it was trained on"
        )


def refuse_other_weights(lineage: Mapping[str, Any] | None, base: Path, what: str, cache: Path | None = None) -> None:
    """Raises UserError where `base` does not have the weights that `what` was trained on."""
    if lineage is None:
        return
    own = lineage["runs"][-1]["base"]
    if identity(base, cache) != own["sha256"]:
        raise UserError(
            f"{what} was trained on {own['name']} with weights {own['sha256'][:12]}, and {base} has {identity(base)[:12]}:"
            " it is another model or was changed since"
        )


def on_the_hub(name: str) -> bool:
    """Whether a name in a configuration can only be a repository of the hub."""
    return bool(HUB_ID.fullmatch(name)) and not name.endswith(".gguf") and not Path(name).exists()
