"""Open a file for reading, decompressing it where its name says so."""

import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from halos.errors import UserError, first_line_of

CODECS = {"gz": "gzip", "bz2": "bz2", "zst": "zstd", "lz4": "lz4", "xz": "xz"}  # by the last suffix, as pyarrow names them
BUFFER = 1 << 20  # bytes


def suffix_of(path: Path) -> str:
    """Return the last suffix of a name in lower case, without its dot."""
    return path.suffix.removeprefix(".").lower()


def inner_suffix(path: Path) -> str:
    """Return the suffix of what a file holds: `jsonl` of a.jsonl and of a.jsonl.gz."""
    return suffix_of(path.with_suffix("")) if suffix_of(path) in CODECS else suffix_of(path)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, decompressed. Raises UserError, also while it is read, where that cannot be done."""
    codec = CODECS.get(suffix_of(path))
    try:
        with _stream(path, codec) as stream:
            yield stream
    except (OSError, EOFError, lzma.LZMAError) as error:
        if codec is None or getattr(error, "strerror", None):
            raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or first_line_of(error)}") from error
        if isinstance(error, EOFError) or "Truncated" in str(error):
            raise UserError(f"{path}: ends within its compressed data, so a part of it is missing: copy it again") from error
        raise UserError(f"{path}: is no .{suffix_of(path)} file, or a damaged one: {first_line_of(error)}") from error


def _stream(path: Path, codec: str | None) -> IO[bytes]:
    if codec is None:
        return path.open("rb")
    if codec == "xz":
        return lzma.open(path)
    import pyarrow as pa

    path.open("rb").close()  # which says why a file cannot be read
    decompressed: Any = pa.CompressedInputStream(pa.OSFile(str(path), "rb"), codec)
    return io.BufferedReader(decompressed, BUFFER)


@contextmanager
def opened_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a file of UTF-8 text, with line ends as they are."""
    with opened(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        yield text


def not_utf8(path: Path, line: int, content: bytes) -> UserError:
    """Return what to raise for a line of a file that is no UTF-8; `content` begins with the line."""
    code = "UTF-16" if line == 1 and content.startswith((b"\xff\xfe", b"\xfe\xff")) else "WINDOWS-1252"
    return UserError(
        f"{path}:{line}: not UTF-8 text: convert it, for example"
        f" iconv -f {code} -t UTF-8 '{path}' > '{path.with_suffix(f'.utf8{path.suffix}')}'"
    )
