"""A rank exits when a local rank has died, instead of hanging in a collective."""

import os
import subprocess
import threading

import psutil
import pytest

from halos.distributed import watchdog


def test_a_rank_exits_when_a_local_rank_dies_unless_it_is_ending_already(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, over = list[int](), threading.Event()
    monkeypatch.setattr(watchdog, "PERIOD", 0.01)
    monkeypatch.setattr(watchdog, "PATIENCE", 0.05)
    monkeypatch.setattr(os, "_exit", lambda status: (ended.append(status), over.set()))
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        local = {1: psutil.Process(other.pid)}
        threading.Timer(0.1, over.set).start()
        watchdog._exit_when_one_dies(local, over)
        assert ended == [], "it lives"
        other.kill()  # and nobody waits for it
        over.clear()
        late = threading.Timer(5.0, over.set)
        late.start()
        watchdog._exit_when_one_dies(local, over)
        late.cancel()
        assert ended == [1]
        monkeypatch.setattr(watchdog, "PATIENCE", 60.0)
        over.clear()
        threading.Timer(0.2, over.set).start()  # as an error of its own does
        watchdog._exit_when_one_dies(local, over)
        assert ended == [1]
