"""Resume a run: its saved configuration with overrides on top, and what they change."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from halos.cli.compose import ConfigTree, keys, plain, set_values
from halos.cli.overrides import repeatable
from halos.config import resume_policy, run_config, validate
from halos.config.overrides import Choices, Override, resolve_keys, typed_keys
from halos.config.resume_policy import Change, PreviousRun
from halos.config.schema import SAFE, Config
from halos.config.secrets import refuse_saved_addresses
from halos.confined import expanded
from halos.distributed.environment import count_from_environment
from halos.errors import UserError, printable
from halos.repository import CONFIG
from halos.rundir import RunDir, is_run, step_of

AUTO = "auto"  # resume=auto: resume the run of this name if it exists, else start it
ONLINE = "online"  # the section of the configuration that only online runs have
# keys of the training that follow from online's in a live loop; of a policy gradient alone
IN_LIVE_LOOPS = {
    "online.sampler.temperature": "train.temperature",
    **{f"online.{name}": f"train.{name}" for name in ("correction", "correction_level", "correction_cap", "correction_floor")},
}
LIVE_STEPS = ("online.steps", "online.minibatches", "online.epochs")  # whose product train.steps is
GRPO = "halos.losses.grpo.grpo"  # whose max_tokens may follow from online's too
REPLACEABLE_GROUPS = ("logging", "checkpoint")  # they affect no training step


def requested_run(parsed: Sequence[Override]) -> str | None:
    """Return the value of resume=, None without it."""
    given = [one for one in parsed if one.key == "resume" and one.values not in ((), (None,))]
    if not given:
        return None
    value = given[0].values[0]
    if len(given) > 1 or type(value) not in (str, int) or value == "":
        text = " ".join(one.text for one in given)
        raise UserError(f"{text}: resume= takes one run directory, for example resume=runs/demo")
    return str(value)


def load_run(path: str, parsed: Sequence[Override], tree: ConfigTree) -> tuple[Config, list[Change]]:
    """Return a saved run's configuration with overrides on top, and what they change. Config groups cannot be chosen again,
    except those for logging and checkpoints."""
    run_dir = RunDir.of_resume(path)
    run_dir.require_run()
    source = run_dir.requested_checkpoint(path) or next(reversed(run_dir.checkpoints_by_step().values()), None)
    settings = last_settings(run_dir)
    for one in parsed:
        _refuse_another_run(one, settings, run_dir, tree.choices)
    composed = run_config.compose_for_resume(settings, str(run_dir.path), path)
    _add_missing_keys(composed, tree)
    _replace_groups(composed, [one for one in parsed if one.chooses(tree.choices)], tree)
    values = [repeatable(one) for one in parsed if not one.chooses(tree.choices)]
    set_values(composed, resolved := resolve_keys(values, tree.choices, keys(composed)))
    _set_what_follows(composed, {one.key for one in resolved})
    _set_divisor(composed, settings, {one.key for one in resolved})
    if missing := _missing_keys(plain(composed)):
        raise UserError(f"{run_dir.config} has no {missing[0]}, which this version needs: pass {missing[0]}=VALUE")
    config = validate.check(composed, [one.text for one in parsed], tree.choices)
    _note_other_cache(settings, config)
    refuse_saved_addresses(config, [one.key for one in parsed])
    return config, _changes(config, run_dir, settings, step_of(source) if source else None)


def _set_what_follows(composed: DictConfig, overridden: Collection[str]) -> None:
    """In a live loop set the keys of the training that follow from the overridden ones of `online`, and the other way round."""
    if OmegaConf.select(composed, "online.steps") is None:
        return
    _set_steps(composed, overridden)
    for key, follows in IN_LIVE_LOOPS.items():
        value, other = OmegaConf.select(composed, key), OmegaConf.select(composed, follows)
        if key in overridden and follows in overridden and value != other:
            raise UserError(f"{key}={value} and {follows}={other} are one number in a live loop: leave out {follows}")
        if key in overridden:
            OmegaConf.update(composed, follows, value)
        elif follows in overridden:
            OmegaConf.update(composed, key, other)


def _set_divisor(composed: DictConfig, settings: dict[str, Any], overridden: Collection[str]) -> None:
    """In a live loop of Dr. GRPO set the tokens that its sum is divided by, where they are as many as sampling might give."""
    given = {*overridden, *typed_keys((settings.get(ONLINE) or {}).get("overrides") or [])}
    if settings.get(ONLINE) is None or composed.loss.get("_target_") != GRPO or "loss.max_tokens" in given:
        return
    longest = [resume_policy.value_at(node, "online.sampler.max_new_tokens") or resume_policy.value_at(node, "train.max_length")
               for node in (settings, plain(composed))]  # fmt: skip
    if composed.loss.get("max_tokens") == longest[0]:
        composed.loss.max_tokens = longest[1]


def _set_steps(composed: DictConfig, overridden: Collection[str]) -> None:
    batches, minibatches, epochs = (OmegaConf.select(composed, key) for key in LIVE_STEPS)
    steps, each = OmegaConf.select(composed, "train.steps"), minibatches * epochs
    if "train.steps" not in overridden:
        OmegaConf.update(composed, "train.steps", batches * each)
    elif "online.steps" in overridden and steps != batches * each:
        raise UserError(
            f"online.steps={batches} gives {batches * each} steps (times online.minibatches and online.epochs), and not"
            f" train.steps={steps}: leave out train.steps"
        )
    elif steps % each:
        raise UserError(f"train.steps={steps} ends within a batch, from which {each} steps learn: give online.steps instead")
    else:
        OmegaConf.update(composed, "online.steps", steps // each)


def begin_where_none(composed: DictConfig) -> None:
    """Take resume=auto out of a composed configuration where there is no run of its name: what it begins is checked as any other
    start is."""
    try:
        is_new = composed.resume == AUTO and not is_run(expanded(composed.run_dir))
    except OmegaConfBaseException:  # which the check of all keys reports
        return
    if is_new:
        composed.resume = None


def continue_if_started(config: Config, overrides: Sequence[str]) -> list[Change]:
    """Make `config` resume the run of its name if that was started already, and return what has changed since. Raises UserError
    if a change would alter what the run computes."""
    run_dir, config.resume = RunDir(config.run_dir), None
    if is_run(run_dir.path) and config.overwrite and run_dir.is_finished():
        print(f"overwrite=true: {run_dir.path}, which is finished, is deleted and started again", file=sys.stderr)
        return []
    if not is_run(run_dir.path):
        return []
    run_dir.require_run()
    config.resume, config.overwrite = str(run_dir.path), False
    settings = last_settings(run_dir)
    for key, value in added_keys(run_dir, settings, overrides).items():
        section, name = key.split(".")
        if isinstance(node := getattr(config, section), dict):
            node[name] = value
        else:
            setattr(node, name, value)
    return _changes(config, run_dir, settings, next(reversed(run_dir.checkpoints_by_step()), None))


def added_keys(run_dir: RunDir, settings: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return keys of the mathematics that are newer than the run, with values that reproduce it, unless they are overridden."""
    overridden = {text.lstrip("+~").partition("=")[0] for text in overrides}
    added = run_config.added_keys(run_dir.read_config(), str(run_dir.path))
    return {key: resume_policy.value_at(settings, key) for key in added if key not in overridden}


def _changes(config: Config, run_dir: RunDir, settings: dict[str, Any], newest: int | None) -> list[Change]:
    """Return what `config` changes in a run, and which of its files were edited. Raises UserError unless config allows changes.

    `newest`: the step of the requested checkpoint, else of the newest: the run resumes from no later one.
    """
    attempts = run_dir.read_attempts()
    by_content = run_config.recorded_content(attempts, str(run_dir.path)) is not None
    total = run_config.recorded_total(attempts)
    past = PreviousRun(settings, run_dir.path, newest, by_content, total)
    changed = resume_policy.compare(config, past)
    resume_policy.refuse_impossible(changed, past)
    changed += edited_files(run_dir, changed)
    if config.resume_changes == "refuse":
        resume_policy.refuse_unsafe(changed, run_dir.path)
    return changed


def edited_files(run_dir: RunDir, changed: Sequence[Change]) -> list[Change]:
    """Return changes of the run's files since it wrote them, except for keys that are overridden now."""
    from halos.checkpoint import runfiles  # here: it imports torch, which wrong input should not wait for

    overridden = {change.key for change in changed}
    return [change for change in runfiles.changed(run_dir) if change.key not in overridden]


def last_settings(run_dir: RunDir) -> dict[str, Any]:
    """Load a run's configuration with the changes of all its attempts."""
    return run_config.load(run_dir.read_config(), run_dir.read_attempts(), str(run_dir.path))


def _note_other_cache(settings: dict[str, Any], config: Config) -> None:
    """Print a note if the run had another cache_dir: a new one would be filled, on a disk that may be too small for it."""
    saved = settings.get("cache_dir")
    if saved != config.cache_dir and not count_from_environment("LOCAL_RANK", 0):
        note = f"the saved run's cache_dir={saved} is not used; this command's is {config.cache_dir}"
        print(printable(f"{note} (cache_dir= sets it)"), file=sys.stderr)


def _refuse_another_run(one: Override, settings: dict[str, Any], run_dir: RunDir, choices: Choices) -> None:
    """Raises UserError for an override that would make it another run."""
    if one.is_hydra or (one.chooses(choices) and one.key not in REPLACEABLE_GROUPS):
        raise UserError(f"{one.text}: resume= keeps the choices of {run_dir.path}; override only values, such as train.steps=200")
    elsewhere = one.key in ("exp_name", "output_root", "run_dir") and one.values != (settings.get(one.key),)
    if elsewhere or (one.key == "overwrite" and True in one.values):
        later = "" if run_dir.final.is_dir() else ", which is there once this run has finished"
        raise UserError(
            f"{one.text}: resume= continues in {run_dir.path}; for a new run from its model leave out resume= and pass"
            f" model.name_or_path={run_dir.final}{later}"
        )


def _missing_keys(whole: dict[str, Any]) -> list[str]:
    """Return the keys that a saved configuration is too old to have."""
    needed = [key for key in resume_policy.ON_RESUME if not key.startswith("online.") or whole.get("online") is not None]
    return [key for key in needed if not resume_policy.has_key(whole, key)]


def _add_missing_keys(composed: DictConfig, tree: ConfigTree) -> None:
    """Add missing keys that affect no training step with the values of config/; run_config.ADDED_KEYS has those of the others."""
    defaults = OmegaConf.load(CONFIG / "checkpoint" / "default.yaml")
    if OmegaConf.select(composed, "checkpoint._target_") == OmegaConf.select(defaults, "_target_"):
        composed.checkpoint = OmegaConf.merge(defaults, composed.checkpoint)
    whole = plain(composed)
    safe = [key for key in _missing_keys(whole) if resume_policy.ON_RESUME[key] == SAFE]
    if not safe:
        return
    fresh = plain(tree.compose([f"loss={ONLINE}"] if whole.get(ONLINE) is not None else []))
    for key in safe:
        OmegaConf.update(composed, key, resume_policy.value_at(fresh, key), force_add=True)


def _replace_groups(composed: DictConfig, parsed: Sequence[Override], tree: ConfigTree) -> None:
    """Apply checkpoint= and logging= again; logging= keeps hooks that are in no logging choice."""
    if not parsed:
        return
    fresh = plain(tree.compose([one.text for one in parsed]))
    if any(one.key == "checkpoint" for one in parsed):
        composed.checkpoint = fresh["checkpoint"]
    if any(one.key == "logging" for one in parsed):
        trackers = {hook for choice in tree.choices["logging"] for hook in plain(tree.compose([f"logging={choice}"]))["hooks"]}
        kept = {name: hook for name, hook in plain(composed)["hooks"].items() if name not in trackers or name in fresh["hooks"]}
        composed.hooks = kept | {name: hook for name, hook in fresh["hooks"].items() if name not in kept}
