"""Every change that a save makes to the file system, seen before it happens: to die there, to refuse it, or to write it down.

What native code writes (safetensors' save_file, the tokenizer's) is written again by Python, byte for byte, and so is seen;
what it writes into a file that Python opened is seen no later than the file's fsync.
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


Listener = Callable[[Change, Callable[[], Any] | None], None]  # the change to come, and for a write how to do half of it


@contextmanager
def tapped(root: Path, listener: Listener) -> Iterator[None]:
    """`listener` hears of each change under `root` just before it is made."""
    root = Path(os.path.realpath(root))
    real = {name: vars(os)[name] for name in ("open", "fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir")}
    real_open = io.open
    sizes: dict[Path, int] = {}  # of files as far as their writes were heard

    def place(path: Any, dir_fd: int | None = None) -> Path | None:
        """Where it is, if that is under `root`."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), os.fspath(path))
        path = Path(os.path.abspath(os.fspath(path)))
        return path if path.is_relative_to(root) else None

    def hear(kind: Kind, path: Path | None, other: Path | None = None) -> None:
        if path is not None:
            listener(Change(kind, path, other), None)

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            path, data = place(self.name), bytes(data)
            assert path is not None
            listener(Change("write", path, data=data), lambda: io.FileIO.write(self, data[: len(data) // 2]))
            sizes[path] += len(data)
            return super().write(data)

    def open_file(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        path = place(file) if set(mode) & set("wax+") else None
        if path is None:
            return real_open(file, mode, buffering, *args, **kwargs)
        if not isinstance(file, int):  # else its descriptor was listened to
            hear("open", path)
            sizes[path] = path.stat().st_size if "a" in mode and path.exists() else 0
        raw = Raw(file if isinstance(file, int) else path, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        stream: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return stream if "b" in mode else io.TextIOWrapper(stream, *args, **kwargs)

    def open_descriptor(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        where = place(path, kwargs.get("dir_fd")) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
        if where is not None:
            adds = bool(flags & os.O_APPEND) and where.exists()
            assert adds or not where.exists(), f"{path} is opened in a way that is not listened to"
            if not adds:
                hear("open", where)
            sizes[where] = where.stat().st_size if adds else 0
        return real["open"](path, flags, *args, **kwargs)

    def fsync(descriptor: int) -> None:
        path = place(descriptor)
        if path in sizes and path.stat().st_size > sizes[path]:  # by native code, into a file that Python opened
            listener(Change("write", path, data=path.read_bytes()[sizes[path] :]), None)
            sizes[path] = path.stat().st_size
        hear("fsync", path)
        if path is None:  # under `root` nobody pulls the plug: it would only cost time
            real["fsync"](descriptor)

    def two(name: str) -> Callable[..., None]:
        def call(source: Any, target: Any, **kwargs: Any) -> None:
            hear("rename", place(source, kwargs.get("src_dir_fd")), place(target, kwargs.get("dst_dir_fd")))
            real[name](source, target, **kwargs)

        return call

    def one(name: str, kind: Kind) -> Callable[..., None]:
        def call(path: Any, *args: Any, **kwargs: Any) -> None:
            where = place(path, kwargs.get("dir_fd"))
            if where is not None and where.parent.is_dir():  # else it fails and changes nothing: mkdir(parents=True) tries
                hear(kind, where)
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
