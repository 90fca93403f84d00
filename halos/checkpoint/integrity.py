"""Check models, adapters and checkpoints that a run starts from against the manifest they were saved with."""

import logging
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from halos import confined
from halos.checkpoint import lineage, manifest, select
from halos.errors import UserError
from halos.hashes import file_hash
from halos.rundir import RunDir

log = logging.getLogger(__name__)

# a manifest.json with two of these is ours, damaged or not
MARKS = (b'"sha256"', b'"seal"', b'"files"', b'"format"')
# files that loading a model reads, whether or not a manifest lists them
LOADED = ("*.safetensors", "*.index.json", "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
          "*.jinja", "vocab*", "merges.txt")  # fmt: skip
EDITABLE = ("README.md",)  # people may rewrite these


def check(directory: Path, key: str, cache: Path | None = None) -> None:
    """Raises UserError where a run saved `directory`, or the directory above it, and its files have changed since.

    A directory from elsewhere has no manifest and is not checked. With a `cache` (a cache_dir) a file is hashed once, until its
    times change. A directory with a lineage and no manifest gets a warning where its weights do not match the lineage.
    """
    root = next((path for path in (directory, directory.parent) if _is_ours(path)), None)
    if root is None:
        _warn_of_other_weights(directory, cache)
        return
    if faults := _damage(root, "" if root == directory else f"{directory.name}/", cache):
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise UserError(
            f"{key}={directory} is not what was saved there: {faults[0]}{more}. Restore it from a copy; or, if the change is"
            f" intended, delete {root / manifest.NAME}"
        )


def _is_ours(directory: Path) -> bool:
    path = directory / manifest.NAME
    if not path.is_file():
        return False
    data = confined.read_bytes(path)
    return sum(mark in data for mark in MARKS) >= 2 or (directory / lineage.NAME).is_file()  # an emptied or truncated manifest


def _damage(root: Path, part: str, cache: Path | None) -> list[manifest.Fault]:
    """Return the faults of all files saved at `root`, or of one `part` of them with its value head and lineage."""
    faults = manifest.verify(root, digest=partial(file_hash, cache=cache), only=(part, "value_head/", "lineage.json"))
    return [fault for fault in faults if fault.file not in EDITABLE and (fault.is_listed or _is_loaded(fault.file))]


def _is_loaded(name: str) -> bool:
    return any(fnmatch(name.rpartition("/")[2], pattern) for pattern in LOADED)


def _warn_of_other_weights(directory: Path, cache: Path | None) -> None:
    chain = lineage.read(directory)
    result = chain["runs"][-1].get("result") if chain is not None else None
    if isinstance(result, dict) and "model" in result and result["model"] != lineage.identity(directory, cache):
        log.warning("%s: these are not the weights that its lineage.json ends with", directory)


def check_final(run: RunDir, cache: Path | None = None) -> None:
    """Raises UserError where the FINAL of a finished run has changed since it was saved."""
    faults = _damage(run.final, "", cache)
    if not faults:
        return
    newest = select.newest(run.checkpoints).path
    remedy = f"delete it, and the same command writes it again from {newest}" if newest else "restore it from a copy"
    raise UserError(f"{run.path} is finished, and its {run.final.name} is not what was saved there ({faults[0]}): {remedy}")


def check_all(paths: Iterable[tuple[str, str | Path | None]], cache: Path | None = None) -> None:
    """Call `check` for each (key, path) whose path is a directory."""
    for key, path in paths:
        if path is not None and Path(path).is_dir():
            check(Path(path), key, cache)
