"""Going on with a saved run: its own configuration with what is typed on top, and what that changes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from halos.cli.compose import ConfigTree, keys, plain, set_values
from halos.cli.overrides import repeatable
from halos.config import resume_policy, run_config, validate
from halos.config.overrides import Choices, Override, resolve_keys
from halos.config.resume_policy import Change, PreviousRun
from halos.config.schema import SAFE, Config
from halos.config.secrets import refuse_saved_addresses
from halos.distributed.environment import count_from_environment
from halos.errors import UserError, printable
from halos.repository import CONFIG
from halos.rundir import RunDir, is_run, step_of

AUTO = "auto"  # resume=auto: go on with the run of this name where there is one, else begin it
ONLINE = "online"  # the workflow, whose section of the configuration no other run has
CHOSEN_AGAIN = ("logging", "checkpoint")  # groups that change no step of a run


def asked(typed: Sequence[Override]) -> str | None:
    """The run directory that resume= names, if there is one."""
    named = [one for one in typed if one.key == "resume" and one.values not in ((), (None,))]
    if not named:
        return None
    value = named[0].values[0]
    if len(named) > 1 or type(value) not in (str, int) or value == "":
        given = " ".join(one.text for one in named)
        raise UserError(f"{given}: resume= takes one run directory, for example resume=runs/demo")
    return str(value)


def resumed(path: str, typed: Sequence[Override], tree: ConfigTree) -> tuple[Config, list[Change]]:
    """A saved run's own configuration with what was typed on top, and what that changes. Its choices are made, but for those
    that only say what is logged and when it is saved."""
    run_dir = RunDir.of_resume(path)
    run_dir.require_run()
    source = run_dir.requested_checkpoint(path) or next(iter(run_dir.checkpoints_by_step().values()), None)
    settings = last_settings(run_dir)
    for one in typed:
        _refuse_another_run(one, settings, run_dir, tree.choices)
    composed = run_config.compose_for_resume(settings, str(run_dir.path), path)
    _add_younger_keys(composed, tree)
    _choose_again(composed, [one for one in typed if one.chooses(tree.choices)], tree)
    values = [repeatable(one) for one in typed if not one.chooses(tree.choices)]
    set_values(composed, resolve_keys(values, tree.choices, keys(composed)))
    if missing := _missing(plain(composed)):
        raise UserError(f"{run_dir.config} has no {missing[0]}, which this version needs: type it, {missing[0]}=VALUE")
    config = validate.check(composed, [one.text for one in typed], tree.choices)
    _note_cache(settings, config)
    refuse_saved_addresses(config, [one.key for one in typed])
    return config, _changes(config, run_dir, settings, step_of(source) if source else None)


def take_up(config: Config, typed: Sequence[str]) -> list[Change]:
    """Have `config`, for which `typed` was typed, go on with the run of its name where that was begun already; what has changed
    since. Raises UserError where a change would alter what it computes."""
    run_dir, config.resume = RunDir(config.run_dir), None
    if is_run(run_dir.path) and config.overwrite and run_dir.is_finished():
        print(f"overwrite=true: {run_dir.path}, which is finished, is deleted and begun anew", file=sys.stderr)
        return []
    if not is_run(run_dir.path):
        return []
    run_dir.require_run()
    config.resume, config.overwrite = str(run_dir.path), False
    settings = last_settings(run_dir)
    for key, value in younger_keys(run_dir, settings, typed).items():
        section, name = key.split(".")
        if isinstance(node := getattr(config, section), dict):
            node[name] = value
        else:
            setattr(node, name, value)
    return _changes(config, run_dir, settings, next(iter(run_dir.checkpoints_by_step()), None))


def younger_keys(run_dir: RunDir, settings: dict[str, Any], typed: Sequence[str]) -> dict[str, Any]:
    """What decides a step and is younger than the run, as that went without it, where nothing else was typed."""
    keys = {word.lstrip("+~").partition("=")[0] for word in typed}
    found = run_config.added_keys(run_dir.read_config(), str(run_dir.path))
    return {key: resume_policy.value_at(settings, key) for key in found if key not in keys}


def _changes(config: Config, run_dir: RunDir, settings: dict[str, Any], oldest: int | None) -> list[Change]:
    """What `config` changes of a run, and what stands in its files and is not what it wrote there; refused where config says so.

    `oldest`: the step of the checkpoint from which the run goes on.
    """
    by_content = run_config.recorded_content(run_dir.read_attempts(), str(run_dir.path)) is not None
    changed = resume_policy.compare(config, PreviousRun(settings, run_dir.path, oldest, by_content))
    changed += altered(run_dir, changed)
    if config.resume_changes == "refuse":
        resume_policy.refuse_unsafe(changed, run_dir.path)
    return changed


def altered(run_dir: RunDir, changed: Sequence[Change]) -> list[Change]:
    """What stands in the run's files and is not what it wrote there, but for keys that are typed anew."""
    from halos.checkpoint import runfiles  # here: it takes torch, which wrong input need not wait for

    typed = {change.key for change in changed}
    return [change for change in runfiles.changed(run_dir) if change.key not in typed]


def last_settings(run_dir: RunDir) -> dict[str, Any]:
    """A run's configuration as it was last changed."""
    return run_config.load(run_dir.read_config(), run_dir.read_attempts(), str(run_dir.path))


def _note_cache(settings: dict[str, Any], config: Config) -> None:
    """A cache that is not followed would be made anew, on a disk that may be too small for it."""
    elsewhere = settings.get("cache_dir")
    if elsewhere != config.cache_dir and not count_from_environment("LOCAL_RANK", 0):
        note = f"the saved run's cache_dir={elsewhere} is not followed; this command's is {config.cache_dir}"
        print(printable(f"{note} (cache_dir= names one)"), file=sys.stderr)


def _refuse_another_run(one: Override, settings: dict[str, Any], run_dir: RunDir, choices: Choices) -> None:
    """Raises UserError for what makes another run of it."""
    if one.is_hydra or (one.chooses(choices) and one.key not in CHOSEN_AGAIN):
        raise UserError(
            f"{one.text}: resume= goes on with the choices of {run_dir.path}; type only values, such as train.steps=200"
        )
    elsewhere = one.key in ("exp_name", "output_root", "run_dir") and one.values != (settings.get(one.key),)
    if elsewhere or (one.key == "overwrite" and True in one.values):
        raise UserError(
            f"{one.text}: resume= goes on in {run_dir.path}; for a new run from its model leave out resume= and type"
            f" model.name_or_path={run_dir.final}"
        )


def _missing(whole: dict[str, Any]) -> list[str]:
    """Keys that a saved configuration is too old to have."""
    wanted = [key for key in resume_policy.ON_RESUME if not key.startswith("online.") or whole.get("online") is not None]
    return [key for key in wanted if not resume_policy.has_key(whole, key)]


def _add_younger_keys(composed: DictConfig, tree: ConfigTree) -> None:
    """What changes no step is as config/ has it now; of what does, run_config.ADDED_KEYS says how older runs went without it."""
    knobs = OmegaConf.load(CONFIG / "checkpoint" / "default.yaml")
    if OmegaConf.select(composed, "checkpoint._target_") == OmegaConf.select(knobs, "_target_"):
        composed.checkpoint = OmegaConf.merge(knobs, composed.checkpoint)
    whole = plain(composed)
    safe = [key for key in _missing(whole) if resume_policy.ON_RESUME[key] == SAFE]
    if not safe:
        return
    fresh = plain(tree.compose([f"loss={ONLINE}"] if whole.get(ONLINE) is not None else []))
    for key in safe:
        OmegaConf.update(composed, key, resume_policy.value_at(fresh, key), force_add=True)


def _choose_again(composed: DictConfig, typed: Sequence[Override], tree: ConfigTree) -> None:
    """checkpoint= anew; logging= anew, which leaves the hooks alone that no logging choice has."""
    if not typed:
        return
    fresh = plain(tree.compose([one.text for one in typed]))
    if any(one.key == "checkpoint" for one in typed):
        composed.checkpoint = fresh["checkpoint"]
    if any(one.key == "logging" for one in typed):
        trackers = {hook for choice in tree.choices["logging"] for hook in plain(tree.compose([f"logging={choice}"]))["hooks"]}
        kept = {name: hook for name, hook in plain(composed)["hooks"].items() if name not in trackers or name in fresh["hooks"]}
        composed.hooks = kept | {name: hook for name, hook in fresh["hooks"].items() if name not in kept}
