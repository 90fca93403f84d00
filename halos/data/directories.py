"""The files of a split of a directory, and of a pattern."""

import re
from pathlib import Path

from halos.data.files import ALIASES, SPLITS, by_split, files_by_split, matching, refuse_missing_shards, root_of
from halos.data.split import default_splits
from halos.errors import UserError


def files_of_split(root: Path, split: str, purpose: str) -> list[Path]:
    """Return the files of `split` below a directory; of that of `purpose` where it is empty. Raises UserError where none has
    such a name, and where several do."""
    splits = files_by_split(root)
    if not split and splits.keys() == {""}:
        refuse_missing_shards(splits[""])
        return splits[""]
    wanted = (ALIASES.get(split.lower(), split.lower()),) if split else default_splits(purpose)
    for name in wanted:
        longer = [other for other in splits if re.match(rf"{re.escape(name)}[-_.]", other)]
        found = [*([name] if name in splits else []), *longer]
        if len(found) > 1 and not (split and name in splits):
            raise UserError(f"{root}: which of {', '.join(found)}? Write {{path: {root}, split: {found[0]}}}, or name each")
        if found:
            refuse_missing_shards(splits[found[0]])
            return splits[found[0]]
    has = ", ".join(name or "files of no split" for name in splits)
    known = f"known names are: {', '.join(SPLITS)}"
    remedy = "leave the name out; a slice of all rows is split: '[:100]'" if splits.keys() == {""} else known
    raise UserError(f"{root}: no files of split '{wanted[0]}' (found: {has}); {remedy}")


def files_of_pattern(pattern: str, split: str, *, any_kind: bool) -> list[Path]:
    """Return the files that match a pattern, those of `split` where it names one. Raises UserError where they belong to several
    splits and none is named."""
    splits = by_split(matching(pattern, any_kind=any_kind), root_of(pattern))
    if split:
        if split.lower() in splits:
            return splits[split.lower()]
        found = ", ".join(name or "no split" for name in splits)
        raise UserError(f"{pattern}: no file of split '{split}' matches (found: {found})")
    if len(named := [name for name in splits if name]) > 1:
        raise UserError(
            f"{pattern}: matches files of {', '.join(named)}: narrow the pattern, or write {{path: {pattern}, split: {named[0]}}}"
        )
    return sorted(path for files in splits.values() for path in files)


def files_below(directory: Path) -> list[Path]:
    """Return all files below a directory, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file())
