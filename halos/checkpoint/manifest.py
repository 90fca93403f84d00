"""What a checkpoint must contain, byte for byte: size and SHA-256 of every file."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "manifest.json"
FORMAT = 1


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
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != NAME)


def describe(directory: Path, facts: dict[str, Any]) -> str:
    """The manifest's text for what lies in `directory` now; `facts` (step, world size, versions) go in beside the files."""
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in files_of(directory)
    }
    return json.dumps({"format": FORMAT, **facts, "files": files}, indent=1)


def read(directory: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none that can be read."""
    try:
        manifest = json.loads((directory / NAME).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def verify(directory: Path) -> list[Fault]:
    """Every file that is missing, altered or not listed; empty where the checkpoint is whole."""
    manifest = read(directory)
    if manifest is None:
        return [Fault(NAME, "missing or unreadable")]
    if manifest.get("format") != FORMAT:
        return [Fault(NAME, f"format {manifest.get('format')!r}, this version reads {FORMAT}")]
    faults, listed = [], manifest["files"]
    for name, facts in listed.items():
        path = directory / name
        if not path.is_file():
            faults.append(Fault(name, "missing"))
        elif path.stat().st_size != facts["bytes"]:
            faults.append(Fault(name, f"{path.stat().st_size} bytes instead of {facts['bytes']}"))
        elif digest(path) != facts["sha256"]:
            faults.append(Fault(name, "contents changed"))
    found = {path.relative_to(directory).as_posix() for path in files_of(directory)}
    return faults + [Fault(name, "not in the manifest") for name in sorted(found - set(listed))]
