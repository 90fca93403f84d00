"""The manifest of a checkpoint: size and SHA-256 of every file, and a seal over the list itself."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halos import confined
from halos.errors import UserError, one_line
from halos.hashes import digest

NAME = "manifest.json"
FORMAT = 1
UNLISTED = "not in the manifest"
# files that operating systems and file servers leave in directories, and nobody reads
STRAY = re.compile(r"\._.*|\.DS_Store|\.nfs[0-9a-f]+|\.fuse_hidden.*|\.directory|Thumbs\.db|desktop\.ini")
SEAL = ',\n "seal": "'  # the last entry, over all that stands before it; every later format keeps this


class NewerFormatError(UserError):
    """A checkpoint that a later version of halos saved: its seal is right, but this version cannot read it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A file that does not match the manifest."""

    file: str
    reason: str

    @property
    def is_listed(self) -> bool:
        return self.reason != UNLISTED

    def __str__(self) -> str:
        return f"{one_line(self.file)}: {self.reason}"


def files_of(directory: Path) -> list[Path]:
    """Return the files of a checkpoint: all regular files below `directory` but the manifest. No link is followed."""
    files = sorted(path for path, regular in _below(directory) if regular and path != directory / NAME)
    return [path for path in files if not STRAY.fullmatch(path.name)]


def _below(directory: Path) -> Iterator[tuple[Path, bool]]:
    """Yield everything that is not a directory, and whether it is a regular file, as are the links of a snapshot in the hub's
    cache that stay in it."""
    home = confined.root_of(directory)
    inside = home.resolve() if home != directory else None
    for parent, directories, names in os.walk(directory):
        yield from ((Path(parent, name), False) for name in directories if Path(parent, name).is_symlink())
        yield from ((path := Path(parent, name), _is_regular(path, inside)) for name in names)


def _is_regular(path: Path, inside: Path | None) -> bool:
    is_inside = inside is not None and path.resolve().is_relative_to(inside)
    return path.is_file() and (is_inside or not path.is_symlink())


def seal(text: str) -> str:
    """Append the SHA-256 of the manifest's text as its last entry, so that a change of any byte shows."""
    return text.removesuffix("\n}") + SEAL + hashlib.sha256(text.encode()).hexdigest() + '"\n}'


def describe(directory: Path, facts: dict[str, Any]) -> str:
    """Return the text of a manifest for the files now in `directory`, with `facts` (step, world size, versions)."""
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in files_of(directory)
    }
    return seal(json.dumps({"format": FORMAT, **facts, "files": files}, indent=1))


def read(directory: Path) -> dict[str, Any] | Fault:
    """Return the manifest, or the fault that makes it unusable. Raises NewerFormatError."""
    if not os.path.lexists(directory / NAME):
        return Fault(NAME, "missing")
    try:
        text = confined.read_text(directory / NAME, within=confined.root_of(directory))
        manifest = confined.parse_json(text, NAME)
    except UserError as error:
        return Fault(NAME, f"unreadable ({error})")
    if text != seal(text.rpartition(SEAL)[0] + "\n}"):
        return Fault(NAME, "contents changed")
    if why := _malformed(manifest):
        return Fault(NAME, f"malformed, though it is sealed: {why}")
    if manifest["format"] > FORMAT:
        raise NewerFormatError(
            f"{directory} was saved by a newer version of halos: its manifest has format {manifest['format']},"
            f" and this version reads {FORMAT}. Use that version"
        )
    return manifest


def _malformed(manifest: Any) -> str | None:
    """Return what is wrong with a sealed manifest, if anything. Of a later format only its number is known."""
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        return "it has no format"
    if manifest["format"] > FORMAT:
        return None
    files = manifest.get("files")
    if not isinstance(files, dict):
        return "it lists no files"
    for name, facts in files.items():
        if not isinstance(facts, dict) or type(facts.get("bytes")) is not int or not isinstance(facts.get("sha256"), str):
            return f"{one_line(name)} has no size and hash"
    if type(manifest.get("step", 0)) is not int:
        return "its step is no number"
    return None


def verify(
    directory: Path, *, contents: bool = True, digest: Callable[[Path], str] = digest, only: Collection[str] = ("",)
) -> list[Fault]:
    """Return a fault for every file that is missing, altered or not listed. Raises NewerFormatError.

    A hidden file that is not listed is no damage: nothing here reads it, and somebody's tools may have left it.
    Without `contents` only the existence and the size of files are checked: nothing is read. `only` holds prefixes of names;
    other files are not checked.
    """
    manifest = read(directory)
    if isinstance(manifest, Fault):
        return [manifest]
    faults, listed = [], {name: facts for name, facts in manifest["files"].items() if name.startswith(tuple(only))}
    present = {path.relative_to(directory).as_posix(): (path, regular) for path, regular in _below(directory)}
    for name, facts in listed.items():
        path, regular = present.get(name, (None, False))  # a listed name such as ../x must not lead out of the directory
        try:
            if path is None:
                faults.append(Fault(name, "missing"))
            elif not regular:
                faults.append(Fault(name, "a link or a device instead of a file"))
            elif path.stat().st_size != facts["bytes"]:
                faults.append(Fault(name, f"{path.stat().st_size} bytes instead of {facts['bytes']}"))
            elif contents and digest(path) != facts["sha256"]:
                faults.append(Fault(name, "contents changed"))
        except OSError as error:
            faults.append(Fault(name, f"unreadable ({error.strerror})"))
    others = (name for name in present.keys() - listed.keys() - {NAME} if not _is_stray(name))
    return faults + [Fault(name, UNLISTED) for name in sorted(others) if name.startswith(tuple(only))]


def _is_stray(name: str) -> bool:
    """Whether a file is hidden or left by an operating system: nothing here reads it."""
    return name.startswith(".") or "/." in name or bool(STRAY.fullmatch(name.rpartition("/")[2]))


def human_size(size: float) -> str:
    """Return a number of bytes in a readable unit."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
