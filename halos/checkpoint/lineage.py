"""Where a model came from: lineage.json holds the chain of runs that made it, from the first base's weights on.

A run takes over the chain of the model that it starts from and adds itself: its configuration, the hashes of its base and
data, and what came out. Each save carries it, so that an adapter knows its base by content and not by path.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos import confined
from halos.config.secrets import redact
from halos.errors import UserError
from halos.hashes import file_hashes
from halos.merge.safetensors_io import weight_files

NAME = "lineage.json"
FORMAT = 1
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def hashes(directory: Path, cache: Path | None = None) -> dict[str, str]:
    """SHA-256 of each weight file of a model or an adapter; with a `cache` (a cache_dir) read once, whatever process asks."""
    return file_hashes(weight_files(directory), cache)


def identity(directory: Path, cache: Path | None = None) -> str:
    """One hash for a model's or an adapter's weights: over the sorted hashes of its files, so that their names do not matter."""
    return hashlib.sha256("\n".join(sorted(hashes(directory, cache).values())).encode()).hexdigest()


def read(directory: Path) -> dict[str, Any] | None:
    """The lineage that was saved with a model, or None where it has none."""
    path = directory / NAME
    if not path.is_file():
        return None
    found = confined.load_object(path)
    if found.get("format") != FORMAT or not _fits(found.get("runs"), [RUN]):
        raise UserError(f"{path} is no lineage of format {FORMAT}")
    return found


# what is read of a run: the rest is shown as it is
RUN: dict[str, Any] = {
    "base": {"name": str, "sha256": str}, "loss": str, "result": {},
    "config": {"model": {}, "train": {}, "optim": {}, "schedule": {}, "peft": {}, "loss": {}}, "data": {},
}  # fmt: skip


def _fits(value: Any, shape: Any) -> bool:
    """Whether a value has the names and kinds of `shape`, in which a list stands for one or more of its kind."""
    if isinstance(shape, list):
        return isinstance(value, list) and bool(value) and all(_fits(each, shape[0]) for each in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(_fits(value.get(name), kind) for name, kind in shape.items())
    return isinstance(value, shape)


def of_adapter(directory: Path) -> dict[str, Any] | None:
    """The lineage of an adapter, which lies beside it or, in a save that holds more, above it."""
    return read(directory) or read(directory.parent)


def begin(base: Path, config: Mapping[str, Any], *, adapter: Path | None = None, **facts: Any) -> dict[str, Any]:
    """The lineage of a run that starts from `base`, or from an `adapter` on it, with what else there is to know of it."""
    before, weights, model = of_adapter(adapter) if adapter else read(base), identity(base), config["model"]
    origin: dict[str, Any] = {"name": model["name_or_path"], "revision": model["revision"], "sha256": weights}
    start = {} if adapter is None else {"adapter": {"path": str(adapter), "sha256": identity(adapter)}}
    kind, came_to = ("model", weights) if adapter is None else ("adapter", start["adapter"]["sha256"])
    if before is not None and before["runs"][-1]["result"].get(kind) != came_to:
        origin["changed"] = "these are not the weights that its lineage ends with"
    run = {"base": origin, **start, **facts, "config": config, "result": {}}
    whole = {"format": FORMAT, "runs": [*(before["runs"] if before else []), run]}
    return json.loads(redact(json.dumps(whole, default=str)))


LOCAL = ("cache_dir", "output_root", "run_dir", "resume")  # keys of a configuration that name places on one machine


def public(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """A lineage for others: no place of this machine's but what it was trained from, and that without the home directory."""
    runs = [
        {**run, "config": {key: value for key, value in run["config"].items() if key not in LOCAL}} for run in lineage["runs"]
    ]
    whole = json.dumps({**lineage, "runs": runs})
    home = json.dumps(str(Path.home()))[1:-1]
    return json.loads(whole.replace(f'"{home}/', '"~/') if len(Path.home().parts) > 1 else whole)


def write(directory: Path, lineage: Mapping[str, Any], made: Mapping[str, Path], **facts: Any) -> dict[str, Any]:
    """lineage.json for a save: `made` (model, adapter) is what the last run of the chain has come to, with `facts` about it."""
    result = {**facts, **{kind: identity(place) for kind, place in made.items()}}
    whole = {**lineage, "runs": [*lineage["runs"][:-1], {**lineage["runs"][-1], "result": result}]}
    (directory / NAME).write_text(json.dumps(whole, indent=1))
    return whole


def refuse_other_base(lineage: Mapping[str, Any] | None, base: Path, what: str, cache: Path | None = None) -> None:
    """Raises UserError where `base` is not the one, by content, that `what` was trained on."""
    if lineage is None:
        return
    wanted = lineage["runs"][-1]["base"]
    if identity(base, cache) != wanted["sha256"]:
        raise UserError(
            f"{what} was trained on {wanted['name']} with weights {wanted['sha256'][:12]}, and {base} has {identity(base)[:12]}:"
            " it is another model or was changed since"
        )


def on_the_hub(name: str) -> bool:
    """Whether a name in a configuration can only be a repository's."""
    return bool(HUB_ID.fullmatch(name)) and not name.endswith(".gguf") and not Path(name).exists()
