"""Sweeps (-m): every job checked before the first starts, then Hydra's sweeper; and what only Hydra's own entry does."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from halos.cli import online, single
from halos.cli.compose import VERSION, ConfigTree, explain, keys, plain
from halos.cli.overrides import all_combinations, countable, first_values, one_by_one
from halos.cli.resume import AUTO, take_up
from halos.cli.status import WRONG_INPUT, refuse
from halos.config import validate
from halos.config.overrides import Override, resolve_keys
from halos.config.schema import Config
from halos.distributed.signals import STOPPED
from halos.errors import JobsFailedError, UserError
from halos.repository import CONFIG
from halos.rundir import RunDir, is_run, job_name

SEEDED = ("tpe", "random", "cmaes", "nsgaii", "motpe")  # Optuna's samplers that draw


def sweep(typed: Sequence[Override], overrides: Sequence[str], flags: Sequence[str], tree: ConfigTree) -> int:
    """Every job, and the report on all of them: the exit status."""
    with tree.opened():
        known = keys(tree.compose(first_values([one for one in typed if one.chooses(tree.choices)])))
        settled = resolve_keys(typed, tree.choices, known)
        jobs = _check(settled, overrides, tree)
        if jobs[0][0].dry_run:
            _make_launcher(tree, [one.text for one in settled if one.is_hydra])
            return _rehearse(jobs, settled, tree)
    shared = f"hydra.job.config.override_dirname.exclude_keys={[one.key for one in settled if not one.is_sweep]}"
    told = [one.text for one in settled] + _of_the_search(settled, jobs[0][0]) + [shared]
    try:
        return enter_hydra([*told, *flags], known)
    finally:
        _report([Path(config.run_dir) for config, _ in jobs])


def through_hydra(typed: Sequence[Override], flags: Sequence[str], tree: ConfigTree) -> int:
    """One run, or what --cfg and --info print, where what was typed is for Hydra itself."""
    _, settled = tree.compose_typed(typed)
    return enter_hydra([one.text for one in settled] + list(flags))


def enter_hydra(words: Sequence[str], known: Sequence[str] = ()) -> int:
    """Hydra as usual, with what was typed settled; `known` are keys that its errors may mean."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # it raises what it would print, and a crash of ours keeps its whole traceback
    sys.argv = [sys.argv[0], *words]
    try:
        hydra.main(version_base=VERSION, config_path=str(CONFIG), config_name="config")(job)()
    except SystemExit as end:  # the only way to hand a status, or what was wrong, on through Hydra
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
    """One of a sweep's jobs, which gives back its objective for the sweeper, or a run that Hydra's own keys were typed for. A
    job that failed or was refused has said so, and the others go on."""
    settings = HydraConfig.get()
    typed: list[str] = plain(settings.overrides.task)
    multirun = settings.mode == RunMode.MULTIRUN
    if multirun and not any(text.lstrip("+").startswith("run_dir=") for text in typed):
        shared: list[str] = plain(settings.job.config.override_dirname.exclude_keys)
        composed.run_dir = f"{plain(composed)['run_dir']}/{job_name(typed, shared)}"
    directories = tuple(Path(source.path) for source in settings.runtime.config_sources if source.schema == "file")
    tree, config, status = ConfigTree(directories), None, WRONG_INPUT
    try:
        config = validate.check(composed, typed, tree.choices)
        if single.is_live(config):
            config = online.live(config, typed, tree)
        changed = take_up(config, typed) if multirun or config.resume == AUTO else []
        status = single.run(config, typed, changed, tree)
    except UserError as error:
        if not multirun:
            raise SystemExit(error) from error
        refuse(error)
    if not multirun or status == STOPPED:
        raise SystemExit(status)
    if status or config is None:
        raise JobsFailedError(f"a job of this sweep failed: {' '.join(typed)}")
    return RunDir(config.run_dir).final_metric(config.objective.metric)


def _check(settled: Sequence[Override], overrides: Sequence[str], tree: ConfigTree) -> list[tuple[Config, list[str]]]:
    """Every job and what is typed for it, before the first starts. They lie in runs/<exp_name>/, which no single run may use.

    A sweeper that searches tries its values in other combinations than all: of each key every value is checked, by itself.
    """
    searches = any(one.key == "hydra/sweeper" and one.values != ("basic",) for one in settled)
    jobs, checked = one_by_one(settled) if searches else all_combinations(settled), list[tuple[Config, list[str]]]()
    for number, words in enumerate(jobs):
        try:
            config = validate.check(tree.compose(words), overrides, tree.choices)
            if config.online is not None:
                online.of_rounds(config, online.inner_overrides(words, config), tree)
        except UserError as error:
            told = [word for word, one in zip(words, countable(settled), strict=True) if one.is_sweep]
            raise UserError(f"{error} (in the job {' '.join(told)})" if told else str(error)) from error
        directory = Path(config.run_dir)
        if number == 0 and is_run(directory):
            raise UserError(f"{directory} holds a single run, and a sweep cannot share its name: choose another exp_name")
        checked.append((config, words))
    return checked


def _make_launcher(tree: ConfigTree, overrides: Sequence[str]) -> None:
    """What starts a sweep's jobs, and what searches for them, made and not begun. Raises UserError for what they do not take."""
    context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
    try:
        composed = hydra.compose(tree.name, [*tree.searchpath, *overrides], return_hydra_config=True)
        Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=job, config=composed)  # and the launcher
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError, OSError) as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError) else UserError(explain(error)) from error


def _rehearse(jobs: Sequence[tuple[Config, list[str]]], settled: Sequence[Override], tree: ConfigTree) -> int:
    """A sweep's dry run: that of each job, here, one after the other. Raises UserError for the first that would be refused."""
    shared = [one.key for one in settled if not one.is_sweep]
    for number, (config, words) in enumerate(jobs, 1):
        typed = [word for word, one in zip(words, countable(settled), strict=True) if not one.is_hydra]
        told = " ".join(word for word, one in zip(words, countable(settled), strict=True) if one.is_sweep)
        print(f"job {number} of {len(jobs)}: {told}", flush=True)
        if not any(one.key == "run_dir" for one in settled):
            config.run_dir = f"{config.run_dir}/{job_name(typed, shared)}"
        try:
            trained = online.live(config, typed, tree) if single.is_live(config) else config
            status = single.run(trained, typed, take_up(trained, typed), tree)
        except UserError as error:
            raise UserError(f"{error} (in the job {told})") from error
        if status:
            return status
    return 0


def _of_the_search(settled: Sequence[Override], config: Config) -> list[str]:
    """What Optuna is to be told unless it was typed: a seed, so that the same command asks for the same jobs, and which way
    the objective is better."""
    typed = {one.key: one.values for one in settled}
    if typed.get("hydra/sweeper") != ("optuna",):
        return []
    overrides = []
    sampler = typed.get("hydra/sweeper/sampler", ("tpe",))
    if "hydra.sweeper.sampler.seed" not in typed and sampler and sampler[0] in SEEDED:
        overrides.append(f"hydra.sweeper.sampler.seed={config.seed}")
    if "hydra.sweeper.direction" not in typed:
        overrides.append(f"hydra.sweeper.direction={'maximize' if config.objective.mode == 'max' else 'minimize'}")
    return overrides


def _report(directories: Sequence[Path]) -> None:
    """A sweep's table and pictures, beside its runs, however it ended."""
    from halos.report.sweep import compare  # here: a run that is no sweep does not need it

    for directory in dict.fromkeys(directories):
        if not any(map(is_run, directory.glob("*"))):
            continue  # no job has come so far
        try:
            text, written = compare(directory)
        except UserError as error:
            print(f"no report: {error}", file=sys.stderr)
            continue
        print(text)
        for path in written:
            print(path)
