"""A process that tokenises rows for another, over its pipes. It ends when that one does.

It does not use multiprocessing, whose `spawn` runs the main module of the run again, and whose `fork` copies its threads' locks.
"""

import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from halos.collection import collect_rarely
from halos.data.row import Row
from halos.errors import UserError

_LENGTH = struct.Struct("<Q")


class WorkerError(Exception):
    """What is to be done cannot be sent to another process."""


class Worker:
    """The caller's end. Raises WorkerError where the settings cannot be used in another process."""

    def __init__(self, tokenise: Any) -> None:
        settings = _pickled(tokenise)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TOKENIZERS_PARALLELISM": "false",
                       "RAYON_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "halos.data.tokenise_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            self._ask(settings)
        except (UserError, OSError, EOFError) as error:
            self.close()
            raise WorkerError(str(error)) from error

    def write_shard(self, directory: Path, rows: Sequence[Row], path: str) -> None:
        """Do as `shards.write_shard`. Raises WorkerError where the rows cannot be sent."""
        message = _pickled((directory, rows, path))
        try:
            self._ask(message)
        except (OSError, EOFError) as error:
            status = self._process.wait()
            raise UserError(
                f"a process that tokenises rows ended with status {status}: start again, what is done is kept"
            ) from error

    def _ask(self, message: bytes) -> None:
        assert self._process.stdin is not None, "opened as a pipe"
        assert self._process.stdout is not None, "opened as a pipe"
        _send(self._process.stdin, message)
        if (problem := _receive(self._process.stdout)) is not None:
            raise UserError(problem)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:  # of a class or function of the user's, anything
        raise WorkerError(f"{type(error).__name__}: {error}") from error


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(_LENGTH.pack(len(message)) + message)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    header = pipe.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError("the other process has ended")
    return pickle.loads(pipe.read(_LENGTH.unpack(header)[0]))  # from the process that started this one, or that this one started


def _main() -> None:
    """Answer each message by None, or by what is wrong."""
    collect_rarely()  # rows make little garbage, and collections take a twentieth of the time
    from halos.data.shards import write_shard

    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints goes to the log
    tokenise = None
    while True:
        try:
            message = _receive(asked)
        except EOFError:
            return
        except Exception as error:  # settings of a module that cannot be imported here
            _send(answers, pickle.dumps(f"{type(error).__name__}: {error}"))
            continue
        problem = None
        if tokenise is None:
            tokenise = message
        else:
            directory, rows, path = message
            try:
                write_shard(directory, rows, tokenise, path)
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{directory.parent}: the tokenised rows cannot be written there: {error}"
        _send(answers, pickle.dumps(problem))


if __name__ == "__main__":
    _main()
