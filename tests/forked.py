"""The zygote from which tests/processes.py forks python processes, and the code that makes a fork equivalent to a new process."""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import inspect
import io
import json
import logging
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from tests import composed

READ_AT_START = ("HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LD_PRELOAD", "PYTHONHASHSEED")
PRELOADED = (  # imported by train.py, by the commands that it starts, and by a run of a small model
    "accelerate.commands.launch", "antlr4.LL1Analyzer", "datasets", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer",
    "halos.models.tiny", "halos.online.label", "halos.online.rounds", "halos.online.sample", "halos.optimizers.standard",
    "halos.report.sweep", "halos.run", "hydra._internal.hydra", "hydra.core.override_parser.overrides_parser", "peft",
    "torch.distributed.run", "transformers.models.llama.configuration_llama", "transformers.models.llama.modeling_llama",
)  # fmt: skip
COLLECT_AFTER = (50_000, 20, 100)  # of gc.set_threshold: with Python's own, collections take a sixth of the time of all tests
Program = tuple[str, str, list[str]]  # c, m or a script's path; the code or the module; sys.argv


def program_of(command: Sequence[Any]) -> Program | None:
    """Return what this interpreter would run for a command; None for another interpreter or unusual options."""
    interpreter, *words = [os.fsdecode(word) for word in command]
    if interpreter != sys.executable:
        return None
    while words and words[0] == "-u":
        words.pop(0)
    if words and words[0] in ("-c", "-m") and len(words) > 1:
        return words[0], words[1], [words[0], *words[2:]]
    return ("script", words[0], words) if words and not words[0].startswith("-") else None


# --- a fork becomes the requested command --------------------------------------------------------------------------------


def become(command: Sequence[str], environment: Mapping[str, str], base: Sequence[str]) -> NoReturn:
    """Run the command and exit. `base` is sys.path without the entries that an interpreter prepends."""
    program = program_of(command)
    assert program is not None
    kind, what, argv = program
    os.environ.clear()
    os.environ.update(environment)
    first = {"-c": "", "-m": os.getcwd(), "script": str(Path(what).resolve().parent)}[kind]
    sys.path[:] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *base]
    sys.argv[:] = argv
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(write_through="-u" in command[1:2])
    _show(command)
    subprocess.Popen._execute_child = partialmethod(_fork, base=base)
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    status = 0
    try:
        if kind == "-m":
            runpy._run_module_as_main(what)
        else:
            code = what if kind == "-c" else Path(what).read_bytes()
            module.__dict__.update({"__file__": what} if kind == "script" else {})
            exec(compile(code, "<string>" if kind == "-c" else what, "exec"), module.__dict__)
    except SystemExit as end:
        status = _status(end.code)
    except BaseException as error:
        trace = error.__traceback__ and error.__traceback__.tb_next  # without this file's own line
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    _end(status)


def _status(code: Any) -> int:
    if code is None or isinstance(code, int):
        return int(code or 0)
    print(code, file=sys.stderr)
    return 1


def _end(status: int) -> NoReturn:
    """Exit as an interpreter does, without finalising it."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


def _show(command: Sequence[str]) -> None:
    """Write the command into /proc/self/cmdline, where tests look for processes."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, room = int(fields[45]), int(fields[46]) - int(fields[45])
    text = b"".join(os.fsencode(word) + b"\0" for word in command)
    ctypes.memmove(start, text[: room - 1].ljust(room, b"\0"), room)


def _settle(descriptors: Sequence[int], directory: str | None, *, session: bool) -> None:
    """Do what happens between fork and exec: descriptors, directory, session, default signal handlers."""
    kept = [os.dup(descriptor) for descriptor in descriptors]  # above 2, wherever they were
    for number, descriptor in enumerate(kept):
        os.dup2(descriptor, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if directory:
        os.chdir(directory)
    if session:
        os.setsid()


# --- a process that was forked starts others -------------------------------------------------------------------------------


_start = subprocess.Popen._execute_child


def _fork(process: subprocess.Popen[Any], *args: Any, base: Sequence[str]) -> None:
    """Replace fork and exec for commands of this interpreter."""
    given = inspect.signature(_start).bind(process, *args).arguments
    environment = dict(os.environ if given["env"] is None else given["env"])
    if given["shell"] or given["pass_fds"] or program_of(given["args"]) is None:
        return _start(process, *args)
    pipes = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
    sys.stdout.flush()
    sys.stderr.flush()
    process.pid = os.fork()
    if not process.pid:
        _forget()
        _settle([n if pipe == -1 else pipe for n, pipe in enumerate(pipes)], given["cwd"], session=given["start_new_session"])
        if given["preexec_fn"]:
            given["preexec_fn"]()
        become([os.fsdecode(word) for word in given["args"]], environment, base)
    process._child_created = True
    ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    process._close_pipe_fds(*(given[name] for name in ends))


def _forget() -> None:
    """Undo what the parent has set up since it was forked."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    atexit._clear()
    atexit.register(logging.shutdown)
    weakref.finalize._registry.clear()  # else the child's next finaliser removes the parent's temporary directories
    weakref.finalize._registered_with_atexit = False
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    for name, logger in [("", logging.root), *logging.root.manager.loggerDict.items()]:
        if isinstance(logger, logging.Logger):
            level, handlers = LOGGERS.get(name, (logging.NOTSET, []))
            logger.setLevel(level)
            logger.handlers[:] = handlers


LOGGERS: dict[str, tuple[int, list[logging.Handler]]] = {}


def main() -> None:
    """Fork at every request, and send the pid and later the wait status; exit when the last connection is closed."""
    base = sys.path[1:]
    gc.set_threshold(*COLLECT_AFTER)
    _warm_up()
    for name, logger in [("", logging.root), *logging.root.manager.loggerDict.items()]:
        if isinstance(logger, logging.Logger):
            LOGGERS[name] = logger.level, list(logger.handlers)
    gc.collect()
    gc.freeze()  # children's collections skip what was imported, so its memory stays shared
    listener, path = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    connections: list[socket.socket] = []
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which close our socket
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    children: dict[int, socket.socket] = {}
    while True:
        ready = select.select([listener, woken, *connections], [], [])[0]
        if woken in ready:
            woken.recv(4096)
            _reap(children)
        if listener in ready:
            connections.append(listener.accept()[0])
            connections[-1].send(str(os.getpid()).encode())
        for requests in [each for each in connections if each in ready]:
            message, descriptors, _, _ = socket.recv_fds(requests, 2**20, 8)
            if message:
                _start_child(json.loads(message), descriptors, children, base)
                continue
            connections.remove(requests)
            requests.close()
            if not connections:
                for file in (path, f"{path}.lock"):
                    Path(file).unlink(missing_ok=True)  # pytest itself removes the directory when it ends
                return


def _start_child(
    request: dict[str, Any], descriptors: Sequence[int], children: dict[int, socket.socket], base: Sequence[str]
) -> None:
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _settle(descriptors[:3], request["directory"], session=request["session"])
        become(request["command"], request["environment"], base)
    children[pid] = socket.socket(fileno=descriptors[3])
    children[pid].send(str(pid).encode())
    for descriptor in descriptors[:3]:
        os.close(descriptor)


def _warm_up() -> None:
    for name in PRELOADED:
        if find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    composed.remember()
    composed.config_of("loss=dpo", "model=tiny", "data=arithmetic", "exp_name=x")  # parses what nearly every command composes
    mapping = importlib.import_module("transformers.conversion_mapping")
    mapping.get_checkpoint_conversion_mapping("llama")  # some hundred patterns, compiled at the first model
    rendezvous = importlib.import_module("torch.distributed.elastic.rendezvous.dynamic_rendezvous")
    rendezvous.get_method_name = lambda depth=2: "not named"  # for an event that nobody reads: it walks all modules


def _reap(children: dict[int, socket.socket]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with children.pop(pid) as said, suppress(OSError):  # its parent may have stopped waiting
            said.send(str(status).encode())


if __name__ == "__main__":
    main()
