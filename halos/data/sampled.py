"""Fingerprints of files that are too large to be read whole before a run: by their names, sizes and parts of their bytes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from halos.errors import UserError

PARTS, PART = 64, 4096  # of a file, evenly spread from its first byte to its last; bytes of each


def sampled_hash(paths: Sequence[Path]) -> str:
    """Return one hash over files; of small ones all bytes are read. Raises UserError for one that cannot be read."""
    total = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            total.update(path.name.encode() + _of_file(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return total.hexdigest()


def _of_file(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode())
    with path.open("rb") as file:
        if size <= PARTS * PART:
            digest.update(file.read())
        else:
            for number in range(PARTS):
                file.seek(number * (size - PART) // (PARTS - 1))
                digest.update(file.read(PART))
    return digest.digest()
