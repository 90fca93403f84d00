"""Sweeps (-m): check every job before the first starts, then run Hydra's sweeper; and commands that need Hydra's entry."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from halos.cli import online, single
from halos.cli.compose import VERSION, ConfigTree, explain, keys, plain
from halos.cli.overrides import all_combinations, enumerable, first_values, one_by_one
from halos.cli.resume import AUTO, continue_if_started
from halos.cli.status import WRONG_INPUT, refuse
from halos.config import validate
from halos.config.overrides import Override, resolve_keys
from halos.config.schema import Config
from halos.distributed.signals import STOPPED
from halos.errors import JobsFailedError, UserError
from halos.repository import CONFIG
from halos.rundir import RunDir, is_run, job_name

SEEDED = ("tpe", "random", "cmaes", "nsgaii", "motpe")  # Optuna's samplers that take a seed


def run_sweep(parsed: Sequence[Override], overrides: Sequence[str], flags: Sequence[str], tree: ConfigTree) -> int:
    """Run every job and write the report; return the exit status."""
    with tree.initialized():
        known = keys(tree.compose(first_values([one for one in parsed if one.chooses(tree.choices)])))
        resolved = resolve_keys(parsed, tree.choices, known)
        jobs = _check_jobs(resolved, overrides, tree)
        if jobs[0][0].dry_run:
            _check_launcher(tree, [one.text for one in resolved if one.is_hydra])
            return _dry_run(jobs, resolved, tree)
        resolved = _added_by_swept_choices(resolved, tree)
    shared = f"hydra.job.config.override_dirname.exclude_keys={[one.key for one in resolved if not one.is_sweep]}"
    arguments = [one.text for one in resolved] + _optuna_defaults(resolved, jobs[0][0]) + [shared]
    try:
        return enter_hydra([*arguments, *flags], known)
    finally:
        _report([Path(config.run_dir) for config, _ in jobs])


def _added_by_swept_choices(resolved: Sequence[Override], tree: ConfigTree) -> list[Override]:
    """The overrides, of which those of keys that only a swept choice has are added (`++`): Hydra composes a configuration without
    the swept choices too, and would refuse them. Every job has been checked for keys that do not exist."""
    if not any(one.is_sweep and one.chooses(tree.choices) for one in resolved):
        return list(resolved)
    fixed = set(keys(tree.compose([one.text for one in resolved if one.chooses(tree.choices) and not one.is_sweep])))
    return [one if one.sign or one.is_sweep or one.is_hydra or one.chooses(tree.choices) or one.key in fixed
            else replace(one, sign="++") for one in resolved]  # fmt: skip


def run_through_hydra(parsed: Sequence[Override], flags: Sequence[str], tree: ConfigTree) -> int:
    """Run a command with options or keys of Hydra itself: a single run, --cfg or --info."""
    _, resolved = tree.compose_parsed(parsed)
    return enter_hydra([one.text for one in resolved] + list(flags))


def enter_hydra(arguments: Sequence[str], known: Sequence[str] = ()) -> int:
    """Call hydra.main with these arguments; `known` are keys to suggest in its errors."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, and crashes keep their tracebacks
    sys.argv = [sys.argv[0], *arguments]
    try:
        hydra.main(version_base=VERSION, config_path=str(CONFIG), config_name="config")(job)()
    except SystemExit as end:  # the only way to pass a status or an error through Hydra
        if isinstance(end.code, UserError):
            raise end.code from None
        if not isinstance(end.code, int | None):
            raise
        return end.code or 0
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        raise cause if isinstance(cause, UserError) else UserError(explain(error, known)) from error
    return 0


def job(composed: DictConfig) -> float | None:
    """Run one job of a sweep and return its objective for the sweeper; or run a single run that entered through Hydra. A job that
    fails or is refused reports it, and the other jobs run on."""
    settings = HydraConfig.get()
    overrides: list[str] = plain(settings.overrides.task)
    multirun = settings.mode == RunMode.MULTIRUN
    if multirun and not any(text.lstrip("+").startswith("run_dir=") for text in overrides):
        shared: list[str] = plain(settings.job.config.override_dirname.exclude_keys)
        composed.run_dir = f"{plain(composed)['run_dir']}/{job_name(overrides, shared)}"
    OmegaConf.update(composed, "loss_choice", settings.runtime.choices.get("loss"), force_add=True)
    directories = tuple(Path(source.path) for source in settings.runtime.config_sources if source.schema == "file")
    tree, config, status = ConfigTree(directories), None, WRONG_INPUT
    try:
        config = validate.check(composed, overrides, tree.choices)
        config.loss_choice = tree.own_choice(config)
        if single.is_live(config):
            config = online.live_config(config, overrides, tree)
        changed = continue_if_started(config, overrides) if multirun or config.resume == AUTO else []
        status = single.run(config, overrides, changed, tree)
    except UserError as error:
        if not multirun:
            raise SystemExit(error) from error
        refuse(error)
    if not multirun or status == STOPPED:
        raise SystemExit(status)
    if status or config is None:
        raise JobsFailedError(f"a job of this sweep failed: {' '.join(overrides)}")
    return RunDir(config.run_dir).final_metric(config.objective.metric)


def _check_jobs(resolved: Sequence[Override], overrides: Sequence[str], tree: ConfigTree) -> list[tuple[Config, list[str]]]:
    """Check every job before the first starts, and return its configuration and overrides. Jobs share runs/<exp_name>/, which no
    single run may use. For a sweeper that searches, every value of every key is checked once, not all combinations.
    """
    searches = any(one.key == "hydra/sweeper" and one.values != ("basic",) for one in resolved)
    jobs, checked = one_by_one(resolved) if searches else all_combinations(resolved), list[tuple[Config, list[str]]]()
    for number, job_overrides in enumerate(jobs):
        try:
            config = validate.check(tree.compose(job_overrides), overrides, tree.choices)
            if single.is_live(config):
                words = zip(job_overrides, enumerable(resolved), strict=True)
                online.live_config(config, [text for text, one in words if not one.is_hydra], tree)
            elif config.online is not None:
                online.round_config(config, online.overrides_of_rounds(job_overrides, config, tree)[0], tree)
        except UserError as error:
            swept = [text for text, one in zip(job_overrides, enumerable(resolved), strict=True) if one.is_sweep]
            raise UserError(f"{error} (in the job {' '.join(swept)})" if swept else str(error)) from error
        directory = Path(config.run_dir)
        if number == 0 and is_run(directory):
            raise UserError(f"{directory} holds a single run, and a sweep cannot share its name: choose another exp_name")
        checked.append((config, job_overrides))
    return checked


def _check_launcher(tree: ConfigTree, overrides: Sequence[str]) -> None:
    """Instantiate the sweeper and the launcher without starting them. Raises UserError for settings that they do not accept."""
    context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
    try:
        composed = hydra.compose(tree.name, [*tree.searchpath, *overrides], return_hydra_config=True)
        Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=job, config=composed)  # and the launcher
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError, OSError) as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError) else UserError(explain(error)) from error


def _dry_run(jobs: Sequence[tuple[Config, list[str]]], resolved: Sequence[Override], tree: ConfigTree) -> int:
    """Dry-run each job in this process, one after the other. Raises UserError for the first that would be refused."""
    shared = [one.key for one in resolved if not one.is_sweep]
    for number, (config, job_overrides) in enumerate(jobs, 1):
        pairs = list(zip(job_overrides, enumerable(resolved), strict=True))
        overrides = [text for text, one in pairs if not one.is_hydra]
        swept = " ".join(text for text, one in pairs if one.is_sweep)
        print(f"job {number} of {len(jobs)}: {swept}", flush=True)
        if not any(one.key == "run_dir" for one in resolved):
            config.run_dir = f"{config.run_dir}/{job_name(overrides, shared)}"
        try:
            trained = online.live_config(config, overrides, tree) if single.is_live(config) else config
            status = single.run(trained, overrides, continue_if_started(trained, overrides), tree)
        except UserError as error:
            raise UserError(f"{error} (in the job {swept})") from error
        if status:
            return status
    return 0


def _optuna_defaults(resolved: Sequence[Override], config: Config) -> list[str]:
    """Return overrides for Optuna that the user has not set: a seed, so that the same command yields the same jobs, and the
    objective's direction."""
    given = {one.key: one.values for one in resolved}
    if given.get("hydra/sweeper") != ("optuna",):
        return []
    overrides = []
    sampler = given.get("hydra/sweeper/sampler", ("tpe",))
    if "hydra.sweeper.sampler.seed" not in given and sampler and sampler[0] in SEEDED:
        overrides.append(f"hydra.sweeper.sampler.seed={config.seed}")
    if "hydra.sweeper.direction" not in given:
        overrides.append(f"hydra.sweeper.direction={'maximize' if config.objective.mode == 'max' else 'minimize'}")
    return overrides


def _report(directories: Sequence[Path]) -> None:
    """Write a sweep's table and plots next to its runs, however it ended."""
    from halos.report.sweep import compare  # here: a single run does not need it

    for directory in dict.fromkeys(directories):
        if not any(map(is_run, directory.glob("*"))):
            continue  # no job has started
        try:
            text, written = compare(directory)
        except UserError as error:
            print(f"no report: {error}", file=sys.stderr)
            continue
        print(text)
        for path in written:
            print(path)
