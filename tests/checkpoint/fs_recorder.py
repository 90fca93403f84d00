"""Calls a listener before each change that a save makes to the file system, to die there, refuse it or record it.

Files that native code writes (safetensors' save_file, the tokenizer's) are written by Python instead, byte for byte; what it
writes into a file that Python opened is reported no later than the file's fsync.
"""

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import safetensors.torch
from transformers import PreTrainedTokenizerFast

Kind = Literal["open", "write", "fsync", "rename", "unlink", "mkdir", "rmdir"]


@dataclass(frozen=True, slots=True)
class Change:
    """One operation on `path`, which is absolute."""

    kind: Kind
    path: Path
    other: Path | None = None  # where a rename leads
    data: bytes = b""  # what a write adds

    def __str__(self) -> str:
        return f"{self.kind} {self.path.name}"


Listener = Callable[
    [Change, Callable[[], Any] | None], None
]  # the coming change, and for a write a function that does half of it


@contextmanager
def recording(root: Path, listener: Listener) -> Iterator[None]:
    """Call `listener` with each change under `root` just before it is made."""
    root = Path(os.path.realpath(root))
    real = {name: vars(os)[name] for name in ("open", "fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir")}
    real_open = io.open
    sizes: dict[Path, int] = {}  # of each file, as far as its writes were reported

    def under_root(path: Any, dir_fd: int | None = None) -> Path | None:
        """Return the absolute path if it is under `root`."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), os.fspath(path))
        path = Path(os.path.abspath(os.fspath(path)))
        return path if path.is_relative_to(root) else None

    def report(kind: Kind, path: Path | None, other: Path | None = None) -> None:
        if path is not None:
            listener(Change(kind, path, other), None)

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            path, data = under_root(self.name), bytes(data)
            assert path is not None
            listener(Change("write", path, data=data), lambda: io.FileIO.write(self, data[: len(data) // 2]))
            sizes[path] += len(data)
            return super().write(data)

    def open_file(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        path = under_root(file) if set(mode) & set("wax+") else None
        if path is None:
            return real_open(file, mode, buffering, *args, **kwargs)
        if not isinstance(file, int):  # else its descriptor was reported
            report("open", path)
            sizes[path] = path.stat().st_size if "a" in mode and path.exists() else 0
        raw = Raw(file if isinstance(file, int) else path, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        stream: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return stream if "b" in mode else io.TextIOWrapper(stream, *args, **kwargs)

    def open_descriptor(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        target = under_root(path, kwargs.get("dir_fd")) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
        if target is not None:
            adds = bool(flags & os.O_APPEND) and target.exists()
            assert adds or not target.exists(), f"{path} is opened in a way that is not recorded"
            if not adds:
                report("open", target)
            sizes[target] = target.stat().st_size if adds else 0
        return real["open"](path, flags, *args, **kwargs)

    def fsync(descriptor: int) -> None:
        path = under_root(descriptor)
        if path in sizes and path.stat().st_size > sizes[path]:  # by native code, into a file that Python opened
            listener(Change("write", path, data=path.read_bytes()[sizes[path] :]), None)
            sizes[path] = path.stat().st_size
        report("fsync", path)
        if path is None:  # under `root` the disk is simulated: a real fsync would only cost time
            real["fsync"](descriptor)

    def two(name: str) -> Callable[..., None]:
        def call(source: Any, target: Any, **kwargs: Any) -> None:
            report("rename", under_root(source, kwargs.get("src_dir_fd")), under_root(target, kwargs.get("dst_dir_fd")))
            real[name](source, target, **kwargs)

        return call

    def one(name: str, kind: Kind) -> Callable[..., None]:
        def call(path: Any, *args: Any, **kwargs: Any) -> None:
            target = under_root(path, kwargs.get("dir_fd"))
            if target is not None and target.parent.is_dir():  # else it fails and changes nothing: mkdir(parents=True) tries
                report(kind, target)
            real[name](path, *args, **kwargs)

        return call

    def serialize_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
        with open_file(filename, "wb") as file:
            file.write(safetensors.torch.serialize(tensors, metadata=metadata))

    class Tokenizer:
        def __init__(self, real: Any) -> None:
            self.real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def save(self, path: str) -> None:
            with open_file(path, "w", encoding="utf-8") as file:
                file.write(self.real.to_str(pretty=True))

    patches = [
        mock.patch.object(builtins, "open", open_file),
        mock.patch.object(io, "open", open_file),
        mock.patch.object(os, "open", open_descriptor),
        mock.patch.object(os, "fsync", fsync),
        *(mock.patch.object(os, name, two(name)) for name in ("rename", "replace")),
        *(mock.patch.object(os, name, one(name, "unlink")) for name in ("unlink", "remove")),
        mock.patch.object(os, "mkdir", one("mkdir", "mkdir")),
        mock.patch.object(os, "rmdir", one("rmdir", "rmdir")),
        mock.patch.object(safetensors.torch, "serialize_file", serialize_file),
        mock.patch.object(PreTrainedTokenizerFast, "backend_tokenizer", property(lambda self: Tokenizer(self._tokenizer))),
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()
