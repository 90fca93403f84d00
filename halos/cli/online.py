"""loss=online: the configuration of the training within the workflow, and the run of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from halos.cli.compose import ConfigTree, plain
from halos.cli.overrides import parse
from halos.cli.resume import last_settings, younger_keys
from halos.config import validate
from halos.config.overrides import check_choices, unknown_inner_loss
from halos.config.resume_policy import Change
from halos.config.schema import Config, Scope, keys_of
from halos.errors import UserError
from halos.rundir import RunDir

# Of a run that is a workflow, and not of the training within it
OWN = {"loss", "online", "data", "objective", "hooks", "logging", *keys_of(Scope.PLACE, Scope.COMMAND)}


def inner_overrides(typed: Sequence[str], config: Config) -> list[str]:
    """What is typed for the training within a workflow, of what was typed for the whole."""
    assert config.online is not None
    passed = [word for word in typed if word.lstrip("+~").partition("=")[0].partition("@")[0].partition(".")[0] not in OWN]
    recipe = ["online=null"] if any(word.startswith("experiment=") for word in passed) else []  # its section is the workflow's
    return [f"loss={config.online.loss}", *passed, *config.online.overrides, *recipe]


def inner(config: Config, overrides: Sequence[str], tree: ConfigTree) -> DictConfig:
    """The configuration of the training within a workflow. Raises UserError where online.loss names none that it could be."""
    online, known = config.online, tree.choices["loss"]
    assert online is not None
    if online.loss is None:
        raise UserError(f"online.loss is missing: what each round trains with, of {', '.join(known)}")
    if online.loss not in known:
        raise UserError(unknown_inner_loss(online.loss, known))
    typed = [parse(text, tree.choices) for text in overrides]
    check_choices(typed, tree.choices, multirun=False)
    composed, _ = tree.compose_typed(typed)
    if plain(composed).get("online") is not None:
        raise UserError(f"online.loss={online.loss} is a workflow itself: name what each of its rounds trains with, such as dpo")
    return composed


def of_rounds(config: Config, overrides: Sequence[str], tree: ConfigTree) -> Config:
    """The training within online rounds: of what it will be given only the feedback is not there yet."""
    own = {name: asdict(config)[name] for name in ("exp_name", "run_dir", "data")}
    return _training(config, overrides, {**own, "online": None}, overrides, tree)


def live(config: Config, typed: Sequence[str], tree: ConfigTree) -> Config:
    """A live loop as the ordinary run that it is: of online.loss, whose rows come from its own policy."""
    assert config.online is not None
    own = {name: asdict(config)[name] for name in OWN - {"loss", "logging"}}
    length = {"train.steps": config.online.steps, "train.temperature": config.online.sampler.temperature}
    return _training(config, inner_overrides(typed, config), {**own, **length}, typed, tree)


def _training(config: Config, overrides: Sequence[str], own: Mapping[str, Any], typed: Sequence[str], tree: ConfigTree) -> Config:
    """The training of `overrides`, checked whole as one command that was `typed`, with values of the workflow's `own`.

    Raises UserError, for one that leaves no policy to sample from too.
    """
    composed = inner(config, overrides, tree)
    for name, value in own.items():
        OmegaConf.update(composed, name, value, force_add=True)
    training = validate.check(composed, typed, tree.choices)
    from halos.config.bind import bind_loss, refuse_if_not_a_policy_loss  # here: they import torch, which the gate has by now

    assert config.online is not None
    refuse_if_not_a_policy_loss(str(config.online.loss), bind_loss(training.loss, training.plugins))
    return training


def rounds(config: Config, typed: Sequence[str], changed: Sequence[Change], tree: ConfigTree) -> int:
    """Online rounds: the exit status. What each round's training is given is checked before anything starts."""
    from halos.logs import configure_logging
    from halos.online import rounds as driver
    from halos.run.round_preview import RoundPreview

    assert config.online is not None
    configure_logging(main=True)
    overrides = inner_overrides(typed, config)
    if config.resume:
        since = [word for word in overrides[1:] if word not in config.online.overrides]
        run_dir = RunDir(config.run_dir)
        overrides = [*driver.stored_overrides(run_dir.path), *since]
        old = younger_keys(run_dir, last_settings(run_dir), overrides)
        # of their adapter and its reference the rounds say themselves what each trains with
        overrides += [f"{key}={value}" for key, value in old.items() if key.startswith("train.") or key == "optim.fused"]
    training = of_rounds(config, overrides, tree)
    status = driver.run(config, training, overrides, typed, changed, partial(RoundPreview, training))
    if not config.dry_run and RunDir(config.run_dir).read_metrics():
        _report(config)
    return status


def _report(config: Config) -> None:
    """Pictures of the rounds."""
    from halos.report.__main__ import main as report_on

    report_on([config.run_dir])
