"""Runs the stages of a round as subprocesses, which die with this process and get its stop requests."""

from __future__ import annotations

import json
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
from halos.config.idle_online import sampler_keys
from halos.config.rollout_modules import engine_class, scorer_class
from halos.config.schema import Config, Online
from halos.distributed.children import CONFIGS, accelerate_config, die_with_parent, environment_without_launcher, failure_reason
from halos.distributed.environment import world_size
from halos.distributed.signals import StopRequest
from halos.errors import UserError
from halos.online.options import FEEDBACK, SAMPLER, SCORER
from halos.repository import COMMAND, PACKAGES, TRAIN
from halos.rollout import feedback

WRONG_INPUT = 2
PERIOD = 0.05  # seconds between polls of a stage
PATIENCE = 600.0  # seconds in which a stage may save after a stop request


class StoppedError(Exception):
    """A stop request ended a stage, which resumes with the run."""


class RefusedError(Exception):
    """A stage refused its input, and has printed the message on the terminal."""


class StageError(Exception):
    """A stage failed for a reason other than wrong input."""


@dataclass
class Stages:
    """Runs stages one after the other. A first signal is passed on to the running stage; a second Ctrl-C ends this process."""

    config: Config

    def __post_init__(self) -> None:
        assert self.config.online is not None
        self.online = self.config.online
        self.request = StopRequest()

    def listen(self) -> None:
        self.request.listen()

    def run(self, command: Sequence[str], log: Path) -> None:
        """Run a command to its end. Raises StoppedError; UserError with the stage's message, or RefusedError where that was on
        the terminal; StageError with its last output."""
        self._raise_if_stopped()
        log.parent.mkdir(parents=True, exist_ok=True)
        on_terminal = sys.stderr.isatty()  # show progress bars; in a log file they would only be clutter
        with os.fdopen(confined.open_to_append(log, within=Path(self.config.run_dir)), "ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=file, stderr=None if on_terminal else file, env=_environment(),
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
            status = self._wait(process)
        self._raise_if_stopped()
        if status == 0:
            return
        if on_terminal and status == WRONG_INPUT:
            raise RefusedError(f"{_name_of(command)} refused its input; its message was on the terminal")
        reason = "its output is above" if on_terminal else failure_reason(log)
        if reason.startswith("error: "):
            raise UserError(reason.removeprefix("error: "))
        raise StageError(f"{_name_of(command)} ended with status {status}: {reason} ({log})")

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        stopping_since = None
        while process.poll() is None:
            if self.request.reason and stopping_since is None:
                stopping_since = time.monotonic()
                process.terminate()
            if stopping_since is not None and time.monotonic() - stopping_since > PATIENCE:
                process.kill()
            time.sleep(PERIOD)
        return process.returncode

    def _raise_if_stopped(self) -> None:
        if self.request.reason:
            raise StoppedError(self.request.reason)

    # --- the commands of the stages --------------------------------------------------------------------------------------

    def sample(
        self, policy: str, prompts: Path, output: Path, *, seed: int, max_length: int, reference: str | None,
        revision: str | None = None, previous: str | None = None, previous_revision: str | None = None, date: str | None = None,
    ) -> list[str]:  # fmt: skip
        """The command that samples from `policy`; `previous` is the one before it, `date` what the chat template writes."""
        online, sampler = self.online, self.online.sampler
        arguments = [
            policy, "--data", str(prompts), "--output", str(output), "--max-length", str(max_length), "--seed", str(seed),
            "--cache-dir", self.config.cache_dir, *SAMPLER.arguments(sampler, only=sampler_keys(sampler)),
        ]  # fmt: skip
        model = self.config.model
        arguments += _options(chat_template=model.chat_template, revision=revision)
        data = self.config.data
        arguments += _options(chat_template_kwargs=json.dumps(data.chat_template_kwargs) if data.chat_template_kwargs else None,
                              system=data.system if data.system != "keep" else None, date=date)  # fmt: skip
        arguments += ["--rescore", str(online.rescore)]
        arguments += _options(previous=previous, previous_revision=previous_revision)
        if reference is not None and online.kl_samples:
            arguments += ["--reference", reference, "--kl-samples", str(online.kl_samples)]
            arguments += _options(reference_revision=model.revision)
        return self._module("halos.online.sample", arguments, on_every_rank=engine_class(sampler.name).loads_model)

    def label(
        self, samples: Path, output: Path, *, kind: str, scores: Path, cache: Path, against: Path | None, date: str | None = None,
    ) -> list[str]:  # fmt: skip
        """The command that scores samples and writes feedback; `date` is what the scorer's chat template writes."""
        scorer = self.online.scorer
        acting = feedback.keys_of(kind, by_verdict=scorer.pairwise)
        of_scorer = [*SCORER.choice(scorer), *SCORER.arguments(scorer, only=scorer_class(scorer.name).takes)]
        arguments = [
            str(samples), str(output), "--feedback", kind, "--scores", str(scores), "--seed", str(self.config.seed),
            "--cache", str(cache), "--cache-dir", self.config.cache_dir, *of_scorer,
            *FEEDBACK.arguments(self.online.feedback, only=acting),
        ]  # fmt: skip
        arguments += ["--truncated", self.online.truncated] if self.online.truncated != feedback.KEEP else []
        arguments += _options(date=date)
        arguments += ["--against", str(against)] if scorer.pairwise and against is not None else []
        arguments += ["--plugins", *self.config.plugins] if self.config.plugins else []
        return self._module("halos.online.label", arguments, on_every_rank=scorer_class(scorer.name).loads_model)

    def train(self, overrides: Sequence[str]) -> list[str]:
        """The command that trains with the overrides of a round."""
        return [*self._launcher(), str(TRAIN), *overrides]

    def _module(self, name: str, arguments: Sequence[str], *, on_every_rank: bool) -> list[str]:
        if on_every_rank and self.processes > 1:
            return [*self._launcher(), "-m", name, *arguments]
        return [sys.executable, "-m", name, *arguments]

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


def refuse_launcher() -> None:
    """Raises UserError where `accelerate launch` has started this process as one of several."""
    if world_size() > 1:
        raise UserError(
            f"loss=online starts accelerate launch itself, for each stage that needs several processes: {COMMAND} loss=online"
            " online.config_file=launch/accelerate/ddp.yaml (or cpu2, ...)"
        )


def config_file(online: Online) -> Path:
    """The config file of accelerate. Raises UserError where it does not exist."""
    if online.config_file is None:
        from halos.distributed.device import uses_gpu

        name = "ddp" if uses_gpu() else "cpu2"
        return CONFIGS / f"{name}.yaml"
    return accelerate_config(online.config_file, "online.config_file")


def _options(**options: Any) -> list[str]:
    """`--name value` for each option that is not None."""
    return [word for name, value in options.items() if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip


def _environment() -> dict[str, str]:
    """This process's environment, with halos on PYTHONPATH so that `-m` finds it."""
    paths = [str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment_without_launcher(PYTHONPATH=os.pathsep.join(paths))


def _name_of(command: Sequence[str]) -> str:
    """The module or script that a command runs."""
    return next((word for word in command if word.startswith("halos.online.") or word.endswith("train.py")), command[0])
