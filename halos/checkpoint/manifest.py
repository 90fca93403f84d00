"""What a checkpoint must contain, byte for byte: size and SHA-256 of every file, and a seal over the list itself."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halos.errors import UserError

NAME = "manifest.json"
FORMAT = 1
SEAL = ',\n "seal": "'  # a promise to every later format: the last entry, over all that stands before it


class NewerFormatError(UserError):
    """A checkpoint of a later version: whole as far as can be told, but not ours to read."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One file that is not what the manifest says."""

    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / NAME)


def seal(text: str) -> str:
    """The manifest's text with its own SHA-256 as last entry, so that a change of any byte of it shows."""
    return text.removesuffix("\n}") + SEAL + hashlib.sha256(text.encode()).hexdigest() + '"\n}'


def describe(directory: Path, facts: dict[str, Any]) -> str:
    """The manifest's text for what lies in `directory` now; `facts` (step, world size, versions) go in beside the files."""
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in files_of(directory)
    }
    return seal(json.dumps({"format": FORMAT, **facts, "files": files}, indent=1))


def read(directory: Path) -> dict[str, Any] | Fault:
    """The manifest, or why it is none. Raises NewerFormatError."""
    try:
        text = (directory / NAME).read_bytes().decode()
        manifest = json.loads(text)
    except FileNotFoundError:
        return Fault(NAME, "missing")
    except (OSError, ValueError) as error:
        return Fault(NAME, f"unreadable ({error})")
    if text != seal(text.rpartition(SEAL)[0] + "\n}"):
        return Fault(NAME, "contents changed")
    if manifest["format"] > FORMAT:
        raise NewerFormatError(
            f"{directory} was saved by a newer version of halos: its manifest has format {manifest['format']},"
            f" and this version reads {FORMAT}. Go on with that version"
        )
    return manifest


def verify(directory: Path, *, contents: bool = True) -> list[Fault]:
    """Every file that is missing, altered or not listed; empty where the checkpoint is whole. Raises NewerFormatError.

    Without `contents` nothing is hashed: only that every file is there with its size, which costs no reading.
    """
    manifest = read(directory)
    if isinstance(manifest, Fault):
        return [manifest]
    faults, listed = [], manifest["files"]
    for name, facts in listed.items():
        path = directory / name
        try:
            if not path.is_file():
                faults.append(Fault(name, "missing"))
            elif path.stat().st_size != facts["bytes"]:
                faults.append(Fault(name, f"{path.stat().st_size} bytes instead of {facts['bytes']}"))
            elif contents and digest(path) != facts["sha256"]:
                faults.append(Fault(name, "contents changed"))
        except OSError as error:
            faults.append(Fault(name, f"unreadable ({error.strerror})"))
    found = {path.relative_to(directory).as_posix() for path in files_of(directory)}
    return faults + [Fault(name, "not in the manifest") for name in sorted(found - set(listed))]


def in_words(size: float) -> str:
    """A number of bytes, for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
