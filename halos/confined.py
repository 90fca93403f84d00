"""Read small files with size limits and write them atomically, never through a link that leaves the run directory.

A run directory may be untrusted, and so may everything in it: a link to ~/.bashrc, a pipe without a writer, a list of a gigabyte.
The directory itself may be reached through a link, such as one to a scratch disk.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from halos.errors import UserError, first_line_of, one_line, user_errors

try:
    from yaml import CSafeLoader as SafeLoader  # six times as fast; bounds how deep lists may lie in lists
except ImportError:
    from yaml import SafeLoader

SMALL = 2**26  # bytes of a JSON file: the tokenizer.json of a large vocabulary has 34 MB
SETTINGS = 2**20  # bytes of a YAML file, which is read at about 100 kB a second
LARGE = 2**32  # bytes of a data file
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: beyond a limit on the size of files
NODES = 100_000  # values in a YAML file, with aliases expanded
REMEDY = "nothing is read or written through it; put what it points to in its place, or delete it"
NO_CODE: dict[str, Any] = {"trust_remote_code": False}  # for every from_pretrained; without it transformers asks on the terminal
SAFELY: dict[str, Any] = {**NO_CODE, "use_safetensors": True}  # for weights: nothing is unpickled
APPENDED = (".log", ".jsonl")  # files that are appended to, so that a hard link to one would change too


class UnreadableError(UserError):
    """A file that is missing or unusable. Callers that can do without it catch this."""


# --- what a directory may hold -------------------------------------------------------------------------------------------


def inspect(root: Path, *, home: Path | None = None) -> None:
    """Raises UserError if anything below `root` leads out of it (or out of `home`, a directory around it that is only read), or
    is neither a file nor a directory. Opens no file."""
    is_read, home = home is not None, Path(os.path.realpath(home or root))
    for entry in _below(str(root)):
        path = Path(entry.path)
        if entry.is_symlink():
            _refuse_leaving(path, home, root)
            continue
        facts = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(facts.st_mode) and not stat.S_ISDIR(facts.st_mode):
            raise UserError(f"{one_line(path)} is {_kind(facts.st_mode)} where a file belongs: delete it")
        is_appended = not is_read and stat.S_ISREG(facts.st_mode) and entry.name.endswith(APPENDED)
        if facts.st_nlink > 1 and is_appended:
            raise UserError(_second_name(path))


def _below(root: str) -> Iterator[os.DirEntry[str]]:
    """Iterate over everything below a directory, without following links."""
    pending = [root]  # not recursive: directories may be deeper than Python's stack
    while pending:
        directory = pending.pop()
        with user_errors(f"{one_line(directory)} cannot be listed"), os.scandir(directory) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        yield from ordered
        pending += [entry.path for entry in reversed(ordered) if entry.is_dir(follow_symlinks=False)]


def _refuse_leaving(path: Path, home: Path, root: Path) -> None:
    target = Path(os.path.realpath(path))
    if target == home or not target.is_relative_to(home):
        raise UserError(f"{one_line(path)} is a link that leaves {one_line(root)} (to {one_line(target)}): {REMEDY}")


def _second_name(path: Path) -> str:
    shown = one_line(path)
    return f"{shown} has a second name (a hard link), whose content would change with it: copy it, and put the copy in its place"


def _kind(mode: int) -> str:
    kinds: tuple[tuple[Callable[[int], bool], str], ...] = (
        (stat.S_ISLNK, "a link"), (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
    )  # fmt: skip
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device")


def refuse_links(path: Path, within: Path) -> None:
    """Raises UserError if `path`, or a directory between it and `within`, is a link that leaves `within`."""
    home = Path(os.path.realpath(within))
    for each in [path, *path.parents]:
        if each == within:
            return
        if each.is_symlink():
            _refuse_leaving(each, home, within)


def expanded(text: str | Path) -> Path:
    """Expand ~ to the home directory; ./~ is a file of that name."""
    return Path(os.path.expanduser(text))


def root_of(directory: Path) -> Path:
    """Return the directory into which links in a model's directory may lead: itself, or the hub cache of a snapshot."""
    snapshots = directory.absolute().parent
    is_snapshot = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    return snapshots.parent if is_snapshot else directory


# --- reading ---------------------------------------------------------------------------------------------------------------


def read_bytes(path: Path, *, within: Path | None = None, most: int = SMALL) -> bytes:
    """Read a file. Raises UnreadableError if it is missing, not a regular file or larger than `most` bytes, and UserError for a
    link that leaves `within`; without `within`, for files that the user named, links are followed."""
    if within is not None:
        refuse_links(path, within)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without a writer would block
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise UnreadableError(f"{one_line(path)} is {_kind(facts.st_mode)} where a file belongs")
            data = file.read(most + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line_of(error)
        raise UnreadableError(f"{one_line(path)} cannot be read: {reason}") from error
    if len(data) > most:
        raise UnreadableError(f"{one_line(path)} is larger than {most} bytes, which no such file is")
    return data


def read_text(path: Path, *, within: Path | None = None, most: int = SMALL) -> str:
    """Read a text file. Raises UnreadableError if it is not UTF-8."""
    try:
        return read_bytes(path, within=within, most=most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{one_line(path)} cannot be read: it is no UTF-8 text") from error


def load_json(path: Path, *, within: Path | None = None, most: int = SMALL) -> Any:
    """Read a JSON file. Raises UnreadableError for invalid JSON."""
    return parse_json(read_text(path, within=within, most=most), one_line(path))


def load_object(path: Path, *, within: Path | None = None, most: int = SMALL) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises UnreadableError for anything else."""
    value = load_json(path, within=within, most=most)
    if not isinstance(value, dict):
        raise UnreadableError(f"{one_line(path)} holds no object with named values")
    return value


def parse_json(text: str, name: str) -> Any:
    """Parse JSON. Raises UnreadableError if it is invalid, or has lone surrogates, huge numbers or endless nesting."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # raises for lone surrogates
    except (ValueError, RecursionError) as error:  # also for a number of 5,000 digits, and for endless nesting
        raise UnreadableError(f"{name} cannot be read as JSON: {first_line_of(error)}") from error
    return value


def to_yaml(value: Any) -> str:
    """Return plain values as YAML, in their order; by libyaml where PyYAML has it, which takes a tenth of the time."""
    settings: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 10_000}
    try:
        return yaml.dump(value, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), **settings)
    except UnicodeEncodeError:  # of a file's name that is no UTF-8
        return yaml.safe_dump(value, **settings)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML into plain values, without tags. Raises UnreadableError if it is invalid."""
    if len(text) > SETTINGS:
        raise UnreadableError(f"{name} is larger than {SETTINGS} characters, which no configuration is")
    try:
        with user_errors(f"{name} cannot be read"):
            value = yaml.load(text, Loader=SafeLoader)
            _count(value)
    except UserError as error:
        raise UnreadableError(str(error)) from error
    return value


def _count(value: Any) -> None:
    """Raises ValueError if aliases expand to more than NODES values."""
    pending, seen = [value], 0
    while pending:
        node = pending.pop()
        seen += 1
        if seen + len(pending) > NODES:
            raise ValueError(f"it holds more than {NODES} values")
        if isinstance(node, dict):
            pending += [*node.keys(), *node.values()]
        elif isinstance(node, (list, tuple, set)):
            pending += node


# --- writing ---------------------------------------------------------------------------------------------------------------


def open_to_append(path: Path, *, within: Path | None = None) -> int:
    """Open a file for appending, created if missing, and return the descriptor. Raises UserError for a symbolic or hard link, and
    for what is not a regular file."""
    if within is not None:
        refuse_links(path.parent, within)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if path.is_symlink():
        raise UserError(f"{one_line(path)} is a link (to {one_line(os.path.realpath(path))}): {REMEDY}")
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if path.exists() and not path.is_file():
            raise UserError(f"{one_line(path)} is {_kind(path.lstat().st_mode)} where a file belongs: delete it") from error
        raise
    facts = os.fstat(descriptor)
    if stat.S_ISREG(facts.st_mode) and facts.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    if stat.S_ISREG(facts.st_mode):
        raise UserError(_second_name(path))
    raise UserError(f"{one_line(path)} is {_kind(facts.st_mode)} where a file belongs: delete it")


def append(path: Path, text: str, *, within: Path | None = None, sync: bool = False) -> None:
    """Append all of `text`; on a full disk nothing."""
    with os.fdopen(open_to_append(path, within=within), "ab", buffering=0) as file:
        before, data = os.fstat(file.fileno()).st_size, memoryview(text.encode("utf-8"))
        try:
            while data:
                data = data[file.write(data) :]
            if sync:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def write_whole(path: Path, content: str | bytes, *, within: Path | None = None) -> None:
    """Write a file atomically, power cuts included. A link at `path` is replaced, not followed."""
    if within is not None:
        refuse_links(path.parent, within)
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    remove(hidden)  # left by a process that had our pid
    try:
        with os.fdopen(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    except IsADirectoryError as error:
        hidden.unlink()
        raise UserError(f"{one_line(path)} is a directory where a file belongs: move it away") from error
    except OSError:
        hidden.unlink(missing_ok=True)  # such as on a full disk
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def overwrite_in_place(path: Path, text: str) -> bool:
    """Overwrite a file that is at least as large, which works on a full disk; pads with spaces. Return whether it worked."""
    data = text.encode("utf-8")
    try:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "r+b", buffering=0) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1 or facts.st_size < len(data):
                return False
            file.write(data.rstrip(b"\n") + b" " * (facts.st_size - len(data)) + b"\n")
            os.fsync(file.fileno())
    except OSError:
        return False
    return True


def remove(path: Path) -> None:
    """Remove whatever is at `path`, if anything: a link itself, not its target."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def copy(source: Path, target: Path, *, within: Path) -> None:
    """Copy a file with its times. Raises UserError if it is not a regular file, or lies outside `within`."""
    refuse_links(source, within)
    if not source.is_file():
        raise UserError(f"{one_line(source)} is {_kind(source.stat().st_mode)} where a file belongs: delete it")
    shutil.copy2(source, target)
