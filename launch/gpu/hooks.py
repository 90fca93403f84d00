"""Hooks by which the suite stops, measures and starves runs that it starts with the public command."""

import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from hot_path_meter import MIB, loaded_mib, resident_mib

import halos
from halos.hooks.base import Hook, Metrics, Run

KILL_AT = "GPU_SUITE_KILL_AT"  # an environment variable, so that the resumed run has the same configuration
PACKAGE = f"{Path(halos.__file__).parent}{os.sep}"
WARM_UP = 2  # steps before the measured ones
LEAST = 2  # measured steps


class Kill(Hook):
    """Kills the process after step KILL_AT, as a preemption without a signal does."""

    def on_step(self, run: Run, metrics: Metrics) -> None:
        if run.step == int(os.environ.get(KILL_AT, "-1")):
            os.kill(os.getpid(), signal.SIGKILL)


class FullMemory(Hook):
    """Leaves the run no memory for its first step: on a GPU what it holds already is its limit."""

    def on_start(self, run: Run) -> None:
        if run.accelerator.device.type != "cuda":
            torch.empty(2**50, dtype=torch.uint8)  # the allocator's own error
            return
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(run.accelerator.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + MIB) / total))


class Synchronisations:
    """Counts, between `begin` and `end`, where the host waits for the device, by the line of halos that is responsible.

    torch warns of them; not of copies from pageable memory, events, and collectives.
    """

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self._filters: Any = None

    def begin(self) -> None:
        self._filters = warnings.catch_warnings()
        self._filters.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._note  # type: ignore[assignment]
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")

    def end(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        self._filters.__exit__(None, None, None)

    def _note(self, message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "synchronizing CUDA operation" not in str(message):
            return
        frames = [frame for frame in traceback.extract_stack()[:-1] if frame.filename.startswith(PACKAGE)]
        place = f"{frames[-1].filename.removeprefix(PACKAGE)}:{frames[-1].lineno}" if frames else f"{filename}:{lineno}"
        self.places[place] = self.places.get(place, 0) + 1


class Measure(Hook):
    """Writes `output` after the last step, or as soon as `seconds` have passed since the first one, and ends the process.

    Steps: WARM_UP, one in which synchronisations are counted, then the measured ones, at least LEAST.
    """

    def __init__(self, *, output: str, seconds: float) -> None:
        self.output, self.seconds, self.started = Path(output), seconds, 0.0
        self.loaded = self.began = self.prepared = 0.0
        self.tokens = 0
        self.steps: list[dict[str, float]] = []
        self.synchronisations = Synchronisations()

    def on_start(self, run: Run) -> None:
        self.cuda = run.accelerator.device.type == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.loaded = torch.cuda.memory_allocated() / MIB
        else:
            self.loaded = loaded_mib(run.model)
            Path("/proc/self/clear_refs").write_text("5")  # restart the peak
        self.started, set_rates = time.perf_counter(), run.learning_rates.set

        def step_begins(step: int) -> Any:
            """A step sets its learning rate before all else; what is computed before the first one is known by then."""
            self.prepared = self.prepared or time.perf_counter() - self.started
            return set_rates(step)

        run.learning_rates.set = step_begins  # type: ignore[method-assign]

    def on_step(self, run: Run, metrics: Metrics) -> None:
        measured = run.step - WARM_UP - 1
        if run.step == WARM_UP:
            self.synchronisations.begin()
            return
        if measured == 0:
            self.synchronisations.end()
        is_last = run.step == run.total_steps or time.perf_counter() - self.started > self.seconds
        is_last = is_last and measured >= LEAST
        if self.cuda and (measured == 0 or is_last):  # between them steps follow each other as they do without this hook
            torch.cuda.synchronize()
        now = time.perf_counter()
        if measured > 0:
            self.steps.append({"seconds": now - self.began, "tokens": run.tokens - self.tokens})
        self.began, self.tokens = now, run.tokens
        if is_last:
            self._write(run)

    def _write(self, run: Run) -> None:
        peak = torch.cuda.max_memory_allocated() / MIB if self.cuda else resident_mib("VmHWM")
        reserved = torch.cuda.max_memory_reserved() / MIB if self.cuda else peak
        record = {"steps": self.steps, "synchronisations": self.synchronisations.places, "loaded_mib": self.loaded,
                  "prepared_s": self.prepared, "microbatch_tokens": run.config.train.microbatch_tokens}  # fmt: skip
        self.output.write_text(json.dumps({**record, "peak_mib": peak, "reserved_mib": reserved}))
        sys.stdout.flush()
        os._exit(0)  # the final model, which takes gigabytes of disk for nothing, is not written
