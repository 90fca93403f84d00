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
# prefixes of files that go with an adapter or a model which is a part of a checkpoint or FINAL
WITH_EACH_PART = ("value_head/", "lineage.json", "tokenizer", "special_tokens_map.json", "chat_template",
                  "generation_config.json")  # fmt: skip
EDITABLE = ("README.md",)  # people may rewrite these


def check(directory: Path, key: str, cache: Path | None = None) -> None:
    """Raises UserError where a run saved `directory`, or the directory above it, and its files have changed since.

    A directory from elsewhere has no manifest and is not checked. With a `cache` (a cache_dir) a file is hashed once, until its
    times change. A directory with a lineage and no manifest gets a warning where its weights do not match the lineage.
    """
    real = directory.resolve()
    damaged = {root: faults for root, part in _roots(real) if (faults := _damage(root, part, cache))}
    if damaged:
        faults, listings = next(iter(damaged.values())), " and ".join(str(root / manifest.NAME) for root in damaged)
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise UserError(
            f"{key}={directory} is not what was saved there: {faults[0]}{more}. Restore it from a copy; or, if the change is"
            f" intended, delete {listings}"
        )
    if not any(map(_is_ours, (real, real.parent))):
        _warn_of_other_weights(real, cache)


def _roots(directory: Path) -> list[tuple[Path, str]]:
    """Return the directories whose manifests list the files of `directory`, each with the prefix of these files: that above
    it, of which an adapter that has a manifest of its own may be a part, and itself."""
    own, part = [(directory, "")] if _is_ours(directory) else [], f"{directory.name}/"
    if not _is_ours(directory.parent):
        return own
    listing = manifest.read(directory.parent)
    is_part = isinstance(listing, manifest.Fault) or any(name.startswith(part) for name in listing["files"])
    return [(directory.parent, part), *own] if is_part or not own else own


def _is_ours(directory: Path) -> bool:
    path = directory / manifest.NAME
    if not path.is_file():
        return False
    data = confined.read_bytes(path)
    return sum(mark in data for mark in MARKS) >= 2 or (directory / lineage.NAME).is_file()  # an emptied or truncated manifest


def _damage(root: Path, part: str, cache: Path | None) -> list[manifest.Fault]:
    """Return the faults of all files saved at `root`, or of one `part` of them with what goes with it."""
    faults = manifest.verify(root, digest=partial(file_hash, cache=cache), only=(part, *WITH_EACH_PART))
    return [fault for fault in faults if fault.file not in EDITABLE and (fault.is_listed or _is_loaded(fault.file))]


def _is_loaded(name: str) -> bool:
    return any(fnmatch(name.rpartition("/")[2], pattern) for pattern in LOADED)


def _warn_of_other_weights(directory: Path, cache: Path | None) -> None:
    chain, kind = lineage.read(directory), "adapter" if (directory / "adapter_config.json").is_file() else "model"
    result = chain["runs"][-1].get("result") if chain is not None else None
    if isinstance(result, dict) and kind in result and result[kind] != lineage.identity(directory, cache):
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
