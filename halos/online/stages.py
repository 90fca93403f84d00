"""The commands behind a round's stages: each a process of its own, which ends with us and is told when we are to stop."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from halos import confined
from halos.config.engines import engine_class
from halos.config.schema import Config, Online
from halos.distributed.children import CONFIGS, accelerate_config, die_with_parent, environment_without_launcher, failure_reason
from halos.distributed.signals import StopRequest
from halos.errors import UserError
from halos.online.options import FEEDBACK, SAMPLER, SCORER
from halos.repository import PACKAGES, TRAIN

WRONG_INPUT = 2
PERIOD = 0.05  # seconds between two looks at a stage
PATIENCE = 600.0  # seconds in which a stage that was told to stop saves what it has


class StoppedError(Exception):
    """A signal ended a stage, which goes on when the run does."""


class RefusedError(Exception):
    """A stage refused what the user wrote, and has said so on the terminal."""


class StageError(Exception):
    """A stage failed, and not because of what the user wrote."""


@dataclass
class Stages:
    """Starts stages one after the other; a first signal is handed on to the one that runs, a second Ctrl-C ends us at once."""

    config: Config

    def __post_init__(self) -> None:
        assert self.config.online is not None
        self.online = self.config.online
        self.request = StopRequest()

    def listen(self) -> None:
        self.request.listen()

    def run(self, command: Sequence[str], log: Path) -> None:
        """Until it is done. Raises StoppedError, UserError with the stage's one message, or StageError with its last words."""
        self._refuse_interrupted()
        log.parent.mkdir(parents=True, exist_ok=True)
        aloud = sys.stderr.isatty()  # progress bars for people; in a log they would only be lines
        with os.fdopen(confined.open_to_append(log, within=Path(self.config.run_dir)), "ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=file, stderr=None if aloud else file, env=_environment(),
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
            status = self._wait(process)
        self._refuse_interrupted()
        if status == 0:
            return
        if aloud and status == WRONG_INPUT:
            raise RefusedError(f"{_name(command)} refused its input; its message was on the terminal")
        words = "its words stand above" if aloud else failure_reason(log)
        if words.startswith("error: "):
            raise UserError(words.removeprefix("error: "))
        raise StageError(f"{_name(command)} ended with status {status}: {words} ({log})")

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        told = None
        while process.poll() is None:
            if self.request.reason and told is None:
                told = time.monotonic()
                process.terminate()
            if told is not None and time.monotonic() - told > PATIENCE:
                process.kill()
            time.sleep(PERIOD)
        return process.returncode

    def _refuse_interrupted(self) -> None:
        if self.request.reason:
            raise StoppedError(self.request.reason)

    # --- what is started -------------------------------------------------------------------------------------------------

    def sample(
        self, policy: str, prompts: Path, output: Path, *, seed: int, max_length: int, reference: str | None,
        revision: str | None = None,
    ) -> list[str]:  # fmt: skip
        """The command that samples from `policy`."""
        online, sampler = self.online, self.online.sampler
        words = [
            policy, "--data", str(prompts), "--output", str(output), "--max-length", str(max_length), "--seed", str(seed),
            "--cache-dir", self.config.cache_dir, *SAMPLER.arguments(sampler),
        ]  # fmt: skip
        model = self.config.model
        words += _given(chat_template=model.chat_template, revision=revision)
        if reference is not None and online.kl_samples:
            words += ["--reference", reference, "--kl-samples", str(online.kl_samples)]
            words += _given(reference_revision=model.revision)
        return self._module("halos.online.sample", words, spread=engine_class(sampler.name).loads_model)

    def label(self, samples: Path, output: Path, *, kind: str, scores: Path, cache: Path, against: Path | None) -> list[str]:
        """The command that labels them."""
        scorer = self.online.scorer
        by = {"function": [word for entry in scorer.functions for word in ("--reward", _flow(entry))],
              "reward_model": ["--reward-model", str(scorer.model)], "judge": ["--judge", str(scorer.model)]}  # fmt: skip
        words = [
            str(samples), str(output), "--feedback", kind, "--scores", str(scores), "--seed", str(self.config.seed),
            "--cache", str(cache), "--cache-dir", self.config.cache_dir, *by[scorer.name], *SCORER.arguments(scorer),
            *FEEDBACK.arguments(self.online.feedback),
        ]  # fmt: skip
        words += ["--against", str(against)] if scorer.pairwise and against is not None else []
        words += ["--plugins", *self.config.plugins] if self.config.plugins else []
        return self._module("halos.online.label", words, spread=scorer.name == "reward_model")

    def train(self, words: Sequence[str]) -> list[str]:
        return [*self._launcher(), str(TRAIN), *words]

    def _module(self, name: str, words: Sequence[str], *, spread: bool) -> list[str]:
        if spread and self.processes > 1:
            return [*self._launcher(), "-m", name, *words]
        return [sys.executable, "-m", name, *words]

    def _launcher(self) -> list[str]:
        """`accelerate launch` where there is a config for it or several processes, else this interpreter alone."""
        online = self.online
        if online.config_file is None and self.processes == 1:
            return [sys.executable]
        file = config_file(online)
        many = ["--num_processes", str(self.processes)] if online.num_processes else []
        port = ["--main_process_port", "0"] if self.processes > 1 else []
        return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), *many, *port]

    @property
    def processes(self) -> int:
        online = self.online
        if online.num_processes or online.config_file is None:
            return online.num_processes or 1
        settings = yaml.safe_load(config_file(online).read_text(encoding="utf-8")) or {}
        return int(settings.get("num_processes") or 1)


def config_file(online: Online) -> Path:
    """Of accelerate. Raises UserError where it is not there."""
    if online.config_file is None:
        from halos.distributed.device import uses_gpu

        name = "ddp" if uses_gpu() else "cpu2"
        return CONFIGS / f"{name}.yaml"
    return accelerate_config(online.config_file, "online.config_file")


def _given(**options: Any) -> list[str]:
    """`--name value` for each that has one."""
    return [word for name, value in options.items() if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip


def _flow(entry: Any) -> str:
    """A reward's entry as one line of YAML."""
    return entry if isinstance(entry, str) else yaml.safe_dump(entry, default_flow_style=True, width=10_000).strip()


def _environment() -> dict[str, str]:
    """Ours, with this code where `-m` finds it."""
    paths = [str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment_without_launcher(PYTHONPATH=os.pathsep.join(paths))


def _name(command: Sequence[str]) -> str:
    return next((word for word in command if word.startswith("halos.online.") or word.endswith("train.py")), command[0])
