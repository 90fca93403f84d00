"""hydra/launcher=accelerate: runs every job of a sweep as an `accelerate launch` of its own, several in parallel."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from halos.config.values import quoted
from halos.distributed.children import CONFIGS, accelerate_config
from halos.distributed.signals import STOPPED
from halos.errors import JobsFailedError, UserError
from halos.repository import TRAIN
from halos.rundir import is_run, job_name


class AccelerateLauncher(Launcher):
    """Its keys are explained in config/hydra/launcher/accelerate.yaml."""

    def __init__(
        self,
        *,
        config_file: str | None,
        num_processes: int | None,
        max_parallel: int | None,
        devices: Sequence[Any] | None,
        args: Sequence[str],
    ) -> None:
        for name, value in (("num_processes", num_processes), ("max_parallel", max_parallel)):
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"hydra.launcher.{name} takes a whole number from 1, or null, not {value!r}")
        self.num_processes, self.max_parallel = num_processes, max_parallel
        self.devices = None if devices is None else [str(device) for device in devices]
        self.args = [str(word) for word in args]
        self.config_file = accelerate_config(config_file, "hydra.launcher.config_file") if config_file is not None else None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs. Raises SystemExit(75) when a signal has stopped it."""
        from halos.sweep import pool, status_table  # here: --help need not wait for them

        jobs = self._jobs(job_overrides, initial_job_idx)
        config, processes = self._accelerate_config()
        slots = self._slots(config, processes)
        sys.stderr.write(
            f"{len(jobs)} jobs, {len(slots)} at a time, each by accelerate launch --config_file"
            f" {os.path.relpath(self.config_file or config)} on {processes} process{'es' if processes > 1 else ''}\n"
        )
        work = pool.Pool(jobs, slots, lambda job: self._command(job, config, processes), status_table.StatusTable(jobs))
        outcomes = work.run()
        for job, outcome in zip(jobs, outcomes, strict=True):
            if outcome.state == "failed":
                sys.stderr.write(f"\njob {job.number} failed: {job.label}\n{outcome.reason}\nwhole log: {job.log}\n")
        sys.stderr.write(f"{status_table.counts(outcomes)}\n")
        if work.stopped:
            sys.stderr.write("stopped: the same command resumes these jobs\n")
            raise SystemExit(STOPPED)
        return [self._returned(job, outcome.state) for job, outcome in zip(jobs, outcomes, strict=True)]

    def _jobs(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Any]:
        from halos.sweep.job import Job, distinct_overrides
        from halos.sweep.pool import log_of

        jobs, sweep = [], Path(str(self.config.hydra.sweep.dir))
        for number, (overrides, label) in enumerate(zip(job_overrides, distinct_overrides(job_overrides), strict=True), first):
            composed = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            path = Path(str(OmegaConf.select(composed, "run_dir")))
            if not any(override.lstrip("+").startswith("run_dir=") for override in overrides):
                path = path / job_name(overrides, OmegaConf.select(composed, "hydra.job.config.override_dirname.exclude_keys"))
            words = [word for word in overrides if not word.startswith("resume=")]
            jobs.append(Job(number, tuple(words), label, path, log_of(sweep, path), self._asks_no_more(words, path)))
        paths = [job.path for job in jobs]
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            raise UserError(
                f"two jobs of this sweep would run in {twice}: leave out run_dir=, and each gets a directory of its own"
            )
        return jobs

    def _asks_no_more(self, words: Sequence[str], path: Path) -> bool:
        """Compare the job with the run that was started in `path`, if any: an experiment file that it composes from may have been
        edited since."""
        from halos.cli.compose import ConfigTree  # here: it imports hydra's entry, which looks for this plugin
        from halos.cli.overrides import parse
        from halos.cli.single import asks_no_more

        if not is_run(path):
            return True
        sources = self.config.hydra.runtime.config_sources
        tree = ConfigTree(tuple(Path(str(each.path)) for each in sources if each.schema == "file"))
        return asks_no_more([parse(word, tree.choices) for word in (*words, f"run_dir={quoted(str(path))}")], tree)

    def _command(self, job: Any, config: Path, processes: int) -> list[str]:
        many = ["--num_processes", str(processes)] if self.num_processes else []
        port = ["--main_process_port", "0"] if processes > 1 else []
        sources = self.config.hydra.runtime.config_sources
        own = [word for each in sources if each.provider == "command-line" for word in ("--config-dir", str(each.path))]
        return [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *many, *port, *self.args,
            str(TRAIN), *own, *job.overrides, f"run_dir={job.path}", "resume=auto",
        ]  # fmt: skip

    def _returned(self, job: Any, state: str) -> JobReturn:
        done = state == "finished"
        return JobReturn(
            overrides=list(job.overrides), cfg=None, hydra_cfg=None, working_dir=str(job.path), task_name="train",
            status=JobStatus.COMPLETED if done else JobStatus.FAILED,
            _return_value=job.objective() if done else JobsFailedError(f"a job of this sweep failed: {job.label}; see {job.log}"),
        )  # fmt: skip

    # --- devices ------------------------------------------------------------------------------------------------------

    def _accelerate_config(self) -> tuple[Path, int]:
        """Return the accelerate config of every job, and its number of processes."""
        if self.config_file is None:
            many, gpus = (self.num_processes or 1) > 1, bool(self._visible())
            name = ("ddp" if gpus else "cpu2") if many else ("gpu1" if gpus else "cpu1")
            return CONFIGS / f"{name}.yaml", self.num_processes or 1
        try:
            settings = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{self.config_file} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(settings, dict) or "distributed_type" not in settings:
            raise UserError(f"{self.config_file} is no accelerate config: it has no distributed_type")
        if int(settings.get("num_machines") or 1) > 1:
            raise UserError(
                f"{self.config_file} is for {settings['num_machines']} machines, and this launcher starts jobs on its own: for a"
                " cluster use launch/slurm, or hydra/launcher=submitit_slurm"
            )
        return self.config_file, self.num_processes or int(settings.get("num_processes") or 1)

    def _slots(self, config: Path, processes: int) -> list[Any]:
        from halos.sweep.slots import allocate, cores

        on_cpu = bool((yaml.safe_load(config.read_text()) or {}).get("use_cpu"))
        devices = [] if on_cpu else self._visible()
        if on_cpu and self.devices:
            raise UserError(f"hydra.launcher.devices={self.devices} names GPUs, and {config} runs on the CPU: leave out one")
        threads = os.environ.get("OMP_NUM_THREADS")
        return allocate(devices, processes=processes, max_parallel=self.max_parallel, cores=cores(), threads=threads)

    def _visible(self) -> list[str]:
        """Return the GPUs that jobs may use, as CUDA_VISIBLE_DEVICES names them."""
        if self.devices is not None:
            return self.devices
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        if named is not None:
            return [device.strip() for device in named.split(",") if device.strip()]
        import torch

        return [str(number) for number in range(torch.cuda.device_count())]
