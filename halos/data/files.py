"""Find the files of an entry: one file, those of a directory by split, or those that match a pattern."""

import json
import re
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from halos.confined import load_object
from halos.data.readers.json_rows import read_jsonl
from halos.data.readers.kinds import KINDS, READERS, is_data, is_read, reader_for
from halos.data.readers.streams import CODECS, inner_suffix
from halos.data.row import Row
from halos.errors import UserError, user_errors

__all__ = ["READERS", "Row", "read_jsonl", "reader_for"]  # of readers/ and row.py, and imported from here

_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_WILD = re.compile(r"[*?[]")


def is_pattern(path: str) -> bool:
    return _WILD.search(path) is not None and not Path(path).exists()


def matching(pattern: str, *, any_kind: bool = False) -> list[Path]:
    """Return the files that match a pattern such as data/*.jsonl, sorted; others than data only where `any_kind` is read, or no
    data match. Raises UserError where there is none."""
    found = [Path(name) for name in glob(pattern, recursive=True)]  # it leaves out names that start with a dot
    if not found:
        raise UserError(f"{pattern}: no file matches this pattern")
    files = sorted(path for path in found if path.is_file() and path.name not in _METADATA)
    if not files:
        raise UserError(f"{pattern}: only directories match this pattern; {found[0]}/* would be the files of one")
    data = [path for path in files if is_read(path) or is_data(path)]
    files = files if any_kind or not data else data
    _refuse_twins(files, Path(pattern))
    return files


def root_of(pattern: str) -> Path:
    """Return the directory before the first wildcard of a pattern."""
    parts = Path(pattern).parts
    fixed = next((n for n, part in enumerate(parts) if _WILD.search(part)), len(parts))
    return Path(*parts[:fixed])


def _files_below(root: Path) -> list[Path]:
    """Return the files below a directory, sorted, following links; names that start with a dot or an underscore are skipped."""
    files, ancestors = list[Path](), {root.resolve()}

    def walk(directory: Path) -> None:
        for entry in sorted(directory.iterdir()):
            if entry.name.startswith((".", "_")):
                continue
            if entry.is_file():
                files.append(entry)
            elif entry.is_dir() and (target := entry.resolve()) not in ancestors:
                ancestors.add(target)
                walk(entry)
                ancestors.discard(target)

    with user_errors(f"{root} cannot be searched"):
        walk(root)
    return sorted(files)


def files_by_split(root: Path) -> dict[str, list[Path]]:
    """Return the data files below `root` by the split in the name of their directory or file; '' where neither names one."""
    if saved := saved_splits(root):
        return saved
    everything = [path for path in _files_below(root) if path.name not in _METADATA]
    files = [path for path in everything if is_read(path)]
    if files and (others := [path for path in everything if is_data(path) and path not in files]):
        raise UserError(
            f"{root}: holds {others[0].relative_to(root)} next to {files[0].relative_to(root)}, and {KINDS}: unpack or convert"
            " it, move it away, or give the files one by one"
        )
    if not files:
        others = [path for path in everything if is_data(path)]
        raise UserError(f"{root}: {KINDS}, and this directory has none{f' (but {others[0].name})' if others else ''}")
    _refuse_twins(files, root)
    splits = by_split(files, root)
    if len(splits) > 1 and "" in splits:
        raise UserError(f"{root}: {splits[''][0].name} belongs to no split, other files do ({', '.join(filter(None, splits))})")
    return splits


def by_split(files: Sequence[Path], root: Path) -> dict[str, list[Path]]:
    """Return files by the split that a part of their path begins with, as `test_prefs`, or where none does, by the end of their
    names."""
    names = [_split_of(path.relative_to(root)) for path in files]
    splits: dict[str, list[Path]] = {}
    for path, name in zip(files, names if any(names) else _splits_at_end(files), strict=True):
        splits.setdefault(name, []).append(path)
    return splits


def _splits_at_end(files: Sequence[Path]) -> list[str]:
    """Return the splits that names end with, if those that are alike but for it have others, or all files have one of several:
    `a_train` and `a_test`, not `unit_test` beside `law`. Else none."""
    bare = [_SHARD.sub("", _stem(path)).lower() for path in files]
    ends, alike = list[str](), dict[str, set[str]]()
    for name in bare:
        found = _ENDS.search(name)
        ends.append(ALIASES.get(found[1], found[1]) if found else "")
        alike.setdefault(name[: found.start()] if found else name, set()).add(ends[-1])
    are_splits = any(len(each) > 1 for each in alike.values()) or (all(ends) and len({*ends}) > 1)
    return ends if are_splits else [""] * len(files)


def kinds_of(files: Sequence[Path]) -> str:
    """Return how many files of each kind there are, where they are of several: `2 jsonl, 1 csv`."""
    kinds = [inner_suffix(path) for path in files]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) if len(counts) > 1 else ""


def _refuse_twins(files: Sequence[Path], root: Path) -> None:
    """Raises UserError for two files that differ in their suffixes alone: their rows would count twice."""
    first: dict[Path, Path] = {}
    for path in files:
        bare = path
        while bare.suffix.removeprefix(".").lower() in (*READERS, *CODECS):
            bare = bare.with_suffix("")
        if (other := first.setdefault(bare, path)) != path:
            raise UserError(
                f"{root}: {other.name} and {path.name} seem to hold the same rows, which would count twice: give the files one by"
                " one, or rename one"
            )


SPLITS = ("train", "eval", "test", "validation", "valid", "val", "dev")
ALIASES = {"training": "train", "evaluation": "eval", "testing": "test", "development": "dev"}
_NAMED = re.compile(rf"({'|'.join(SPLITS)})(?:$|[-_.])", re.IGNORECASE)
_ENDS = re.compile(rf"(?:^|[-_.])({'|'.join((*ALIASES, *sorted(SPLITS, key=len, reverse=True)))})$", re.IGNORECASE)
_SHARD = re.compile(r"(?:[-_.](?:part|shard)?[-_.]?\d+)+(?:[-_.]of[-_.]\d+(?:-[0-9a-f]{16})?)?$", re.IGNORECASE)
_NUMBERED = re.compile(r"(.*?)(\d{5})[-_.]of[-_.](\d{5})(?:-[0-9a-f]{16})?", re.IGNORECASE)  # push_to_hub has added a hash


def _split_of(path: Path) -> str:
    """Return `test` for test/a.jsonl, test.jsonl and test-00000-of-00002.parquet, `test_prefs` for test_prefs-00000-of-00001."""
    parts = [_SHARD.sub("", part).lower() for part in (*path.parts[:-1], _stem(path))]
    named = next((part for part in parts if _NAMED.match(part) or part in ALIASES), "")
    return ALIASES.get(named, named)


def _stem(path: Path) -> str:
    """Return the name of a file without its suffixes."""
    return (path.with_suffix("") if path.suffix.removeprefix(".").lower() in CODECS else path).stem


def refuse_missing_shards(files: Sequence[Path]) -> None:
    """Raises UserError where names such as train-00000-of-00003 say that there are more files."""
    shards = dict[tuple[str, int], set[int]]()
    for path in files:
        if found := _NUMBERED.fullmatch(_stem(path)):
            shards.setdefault((found[1], int(found[3])), set()).add(int(found[2]))
    for (name, count), numbers in shards.items():
        if len(numbers) < count:
            first = min(1, *numbers) if len(numbers) > 1 else 0
            missing = next(number for number in range(first, first + count) if number not in numbers)
            raise UserError(
                f"{files[0].parent / name}*: {len(numbers)} of {count} files are here, and number {missing} is missing: copy it"
                " too, or give those that are here one by one"
            )


# --- directories that save_to_disk of `datasets` has written -----------------------------------------------------------


def saved_splits(root: Path) -> dict[str, list[Path]]:
    """Return the arrow files of a directory that `save_to_disk` wrote, by split, '' where it has none; empty for others."""
    if (root / "dataset_dict.json").is_file():
        names = load_object(root / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) and (root / name).is_dir() for name in names):
            raise UserError(f"{root}: its dataset_dict.json names the splits {json.dumps(names)}, and not all of them are here")
        return {name.lower(): _saved_files(root / name) for name in names}
    return {"": _saved_files(root)} if (root / "state.json").is_file() and any(root.glob("*.arrow")) else {}


def _saved_files(directory: Path) -> list[Path]:
    """Return the files of one split in their order. Raises UserError where one is missing."""
    state = load_object(directory / "state.json")
    listed = state.get("_data_files")
    files = [directory / str(each.get("filename")) for each in listed or [] if isinstance(each, dict)]
    if missing := [path for path in files if not path.is_file()]:
        raise UserError(f"{directory}: its state.json names {missing[0].name}, which is missing")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(f"{directory}: its rows are selected by an index beside them: write it again with flatten_indices()")
    return files
