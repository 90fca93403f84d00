"""What another run saved, checked against its manifest before anything goes on from it."""

import logging
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from halos import confined
from halos.checkpoint import find, lineage, manifest
from halos.errors import UserError
from halos.hashes import file_hash
from halos.rundir import RunDir

log = logging.getLogger(__name__)

# two of them make a manifest.json one of ours, damaged or not
MARKS = (b'"sha256"', b'"seal"', b'"files"', b'"format"')
# of a file that no manifest lists: whether loading would read it
READ = ("*.safetensors", "*.index.json", "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja",
        "vocab*", "merges.txt")  # fmt: skip
OF_PEOPLE = ("README.md",)  # which may be written anew


def check(directory: Path, key: str, cache: Path | None = None) -> None:
    """Raises UserError where a run has saved `directory`, or what it is a part of, and it is no longer what was saved.

    A directory of anybody else's has no manifest, and nothing is known of it. With a `cache` (a cache_dir) a file is hashed
    once for as long as its times stay. What has a lineage and no manifest is told where its weights are other ones.
    """
    root = next((place for place in (directory, directory.parent) if _is_ours(place)), None)
    if root is None:
        _tell_other_weights(directory, cache)
        return
    if faults := _damage(root, "" if root == directory else f"{directory.name}/", cache):
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise UserError(
            f"{key}={directory} is not what was saved there: {faults[0]}{more}. Bring it back from a copy; or, if the change is"
            f" meant, delete {root / manifest.NAME}"
        )


def _is_ours(directory: Path) -> bool:
    path = directory / manifest.NAME
    if not path.is_file():
        return False
    data = confined.read_bytes(path)
    return sum(mark in data for mark in MARKS) >= 2 or (directory / lineage.NAME).is_file()  # emptied, or cut off


def _damage(root: Path, part: str, cache: Path | None) -> list[manifest.Fault]:
    """Of all that is saved at `root`, or of one `part` of it and what goes with that."""
    faults = manifest.verify(root, digest=partial(file_hash, cache=cache), only=(part, "value_head/", "lineage.json"))
    return [fault for fault in faults if fault.file not in OF_PEOPLE and (fault.is_listed or _is_read(fault.file))]


def _is_read(name: str) -> bool:
    return any(fnmatch(name.rpartition("/")[2], pattern) for pattern in READ)


def _tell_other_weights(directory: Path, cache: Path | None) -> None:
    chain = lineage.read(directory)
    result = chain["runs"][-1].get("result") if chain is not None else None
    if isinstance(result, dict) and "model" in result and result["model"] != lineage.identity(directory, cache):
        log.warning("%s: these are not the weights that its lineage.json ends with", directory)


def check_final(run: RunDir, cache: Path | None = None) -> None:
    """Raises UserError where a finished run's FINAL is not what it saved."""
    faults = _damage(run.final, "", cache)
    if not faults:
        return
    newest = find.newest(run.checkpoints).path
    again = f"delete it, and the same command makes it again from {newest}" if newest else "bring it back from a copy"
    raise UserError(f"{run.path} is finished, and its {run.final.name} is not what was saved there ({faults[0]}): {again}")


def check_all(named: Iterable[tuple[str, str | Path | None]], cache: Path | None = None) -> None:
    """`check` for each that is a directory."""
    for key, place in named:
        if place is not None and Path(place).is_dir():
            check(Path(place), key, cache)
