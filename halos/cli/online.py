"""loss=online: the configuration of the training inside an online run, and the run itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from halos.cli.compose import ConfigTree, plain
from halos.cli.overrides import parse
from halos.cli.resume import GRPO, IN_LIVE_LOOPS, LIVE_STEPS, added_keys, last_settings
from halos.config import idle_online, run_config, validate
from halos.config.overrides import check_choices, typed_keys, unknown_inner_loss
from halos.config.resume_policy import Change, value_at
from halos.config.schema import Config, Scope, keys_of
from halos.errors import UserError
from halos.rundir import RunDir

if TYPE_CHECKING:
    from halos.config.bind import LossSpec

# Keys of the online run, not of the training inside it
OUTER = {"loss", "online", "data", "objective", "hooks", "logging", *keys_of(Scope.PLACE, Scope.COMMAND)}


# Keys of the whole online run, which the training inside it has too
COMMON = {"model", "data", "experiment", "online", "seed", *keys_of(Scope.PLACE, Scope.COMMAND, Scope.HOST)}


def _refuse_common(overrides: Sequence[str]) -> None:
    """Raises UserError for an override of the training alone that would train another policy than is sampled from, or do
    nothing."""
    for text in overrides:
        key = text.strip().lstrip("+~").partition("=")[0].partition("@")[0]
        if key == "loss":
            raise UserError(f"online.overrides=[{text}]: online.loss names the loss that is trained with")
        if key.partition(".")[0] in COMMON:
            raise UserError(
                f"online.overrides=[{text}]: {key} is of the whole online run, and the training inside it follows: give it"
                " outside online.overrides"
            )


def inner_overrides(overrides: Sequence[str], config: Config) -> list[str]:
    """Return the overrides of an online run that apply to the training inside it."""
    assert config.online is not None
    _refuse_common(config.online.overrides)
    passed = [text for text in overrides if text.lstrip("+~").partition("=")[0].partition("@")[0].partition(".")[0] not in OUTER]
    recipe = ["online=null"] if any(text.startswith("experiment=") for text in passed) else []  # that section is the online run's
    return [f"loss={config.online.loss}", *passed, *config.online.overrides, *recipe]


def overrides_of_rounds(overrides: Sequence[str], config: Config, tree: ConfigTree) -> tuple[list[str], bool]:
    """Return the overrides of the rounds' training, and whether it warms up in the first round alone: with an optimizer that is
    carried over the learning rate is constant, unless a schedule was chosen, which then acts in every round."""
    assert config.online is not None
    loss, *inner = inner_overrides(overrides, config)
    composed, typed = compose_inner(config, [loss, *inner], tree), typed_keys(inner)
    if (tokens := _divisor(config, composed.loss, composed.train.max_length, typed, tree)) is not None:
        inner.append(f"loss.max_tokens={tokens}")
    if not config.online.carry_optimizer or _chooses_schedule(composed, typed, tree):
        return [loss, *inner], False
    return [loss, "schedule=constant", *inner], True


def _chooses_schedule(composed: DictConfig, typed: Sequence[str], tree: ConfigTree) -> bool:
    keys = {key.partition("@")[0] for key in typed} - {"schedule.warmup"}  # which a constant rate has too
    if any(key.partition(".")[0] == "schedule" for key in keys):
        return True
    default = tree.compose([]).schedule.get("_target_")
    return composed.schedule.get("_target_") != default  # by a recipe, or a loss of the user's


def _divisor(
    config: Config, loss: Mapping[str, Any] | DictConfig, max_length: int, typed: Sequence[str], tree: ConfigTree
) -> int | None:
    """Return the tokens that Dr. GRPO's sum over a completion is divided by, as many as sampling may give one; None for other
    losses, and where the divisor was given."""
    online = config.online
    assert online is not None
    if loss.get("_target_") != GRPO or loss.get("max_tokens") is None or "loss.max_tokens" in typed:
        return None
    if loss["max_tokens"] != tree.compose([f"loss={online.loss}"]).loss.max_tokens:
        return None  # by a recipe
    return online.sampler.max_new_tokens or max_length


def _with_divisor(overrides: Sequence[str], config: Config, tree: ConfigTree) -> list[str]:
    """Return the overrides of rounds that go on, with the divisor of the present keys where it was computed from them."""
    assert config.online is not None
    others = [text for text in overrides if not text.startswith("loss.max_tokens=") or text in config.online.overrides]
    if len(others) == len(overrides):
        return others
    composed = compose_inner(config, others, tree)
    tokens = _divisor(config, composed.loss, composed.train.max_length, typed_keys(others), tree)
    return list(overrides) if tokens is None else [*others, f"loss.max_tokens={tokens}"]


def compose_inner(config: Config, overrides: Sequence[str], tree: ConfigTree) -> DictConfig:
    """Compose the configuration of the training inside an online run. Raises UserError for an unusable online.loss."""
    online, known = config.online, tree.choices["loss"]
    assert online is not None
    if online.loss is None:
        raise UserError(
            "online.loss is missing: the loss that the policy is trained with, such as dpo, grpo, kto or ppo; config/loss has all"
        )
    if online.loss not in known:
        raise UserError(unknown_inner_loss(online.loss, known))
    parsed = [parse(text, tree.choices) for text in overrides]
    check_choices(parsed, tree.choices, multirun=False)
    composed, _ = tree.compose_parsed(parsed)
    if plain(composed).get("online") is not None:
        raise UserError(f"online.loss={online.loss} is an online run itself: name the loss of its rounds, such as dpo")
    return composed


def round_config(config: Config, overrides: Sequence[str], tree: ConfigTree) -> Config:
    """Return the configuration of a round's training; only its feedback data do not exist yet."""
    outer = {name: asdict(config)[name] for name in ("exp_name", "output_root", "run_dir", "data")}
    return _training(config, overrides, {**outer, "online": None}, overrides, tree)[0]


def live_config(config: Config, overrides: Sequence[str], tree: ConfigTree) -> Config:
    """Return the configuration of a live loop: an ordinary run of online.loss on samples of its own policy."""
    assert config.online is not None
    outer = {name: asdict(config)[name] for name in OUTER - {"loss", "logging"}}
    settings, typed = asdict(config), typed_keys(overrides)
    steps = prod(value_at(settings, key) for key in LIVE_STEPS)
    inner = inner_overrides(overrides, config)
    training, loss = _training(config, inner, {**outer, "train.steps": steps}, overrides, tree)
    idle_online.refuse_idle_reference(config, overrides, is_read=loss.needs_reference)
    idle_online.refuse_idle_rescoring(config, overrides, compares_all=loss.on_rollouts)
    if (tokens := _divisor(config, training.loss, training.train.max_length, typed_keys(inner), tree)) is not None:
        training.loss["max_tokens"] = tokens
    follow = {**IN_LIVE_LOOPS} if loss.on_rollouts else {}  # the log-probs of other losses are not the sampler's
    values = {"train.steps": ("online.steps", steps), **{to: (key, value_at(settings, key)) for key, to in follow.items()}}
    for follows, (key, value) in values.items():
        own = value_at(settings, follows)
        if follows in typed and own != value:
            raise UserError(f"{key}={value} and {follows}={own} are one number in a live loop: leave out {follows}")
        setattr(training.train, follows.partition(".")[2], value)
    return training


def _training(
    config: Config, overrides: Sequence[str], outer: Mapping[str, Any], command: Sequence[str], tree: ConfigTree
) -> tuple[Config, LossSpec]:
    """Compose `overrides`, set the `outer` values of the online run, and validate the result. `command`: those of the online run.

    Raises UserError, for a loss that trains no policy too.
    """
    composed = compose_inner(config, overrides, tree)
    for name, value in outer.items():
        OmegaConf.update(composed, name, value, force_add=True)
    training = validate.check(composed, command, tree.choices)
    training.loss_choice = tree.own_choice(training)
    from halos.config.bind import bind_loss, refuse_if_not_a_policy_loss  # here: they import torch, which validation has by now

    assert config.online is not None
    loss = bind_loss(training.loss, training.plugins)
    refuse_if_not_a_policy_loss(str(config.online.loss), loss)
    return training, loss


def run_rounds(config: Config, command: Sequence[str], changed: Sequence[Change], tree: ConfigTree) -> int:
    """Run online rounds and return the exit status. The training of the rounds is checked before anything starts."""
    from halos.logs import configure_logging
    from halos.online import rounds as driver
    from halos.run.round_preview import RoundPreview

    assert config.online is not None
    configure_logging(main=True)
    if config.resume:
        overrides = inner_overrides(command, config)
        since = [text for text in overrides[1:] if text not in config.online.overrides]
        run_dir = RunDir(config.run_dir)
        overrides = _with_divisor([*driver.stored_overrides(run_dir.path), *since], config, tree)
        added = added_keys(run_dir, last_settings(run_dir), overrides)
        # the rounds themselves set the adapter and its reference for each training
        theirs = {key: value for key, value in added.items() if key.startswith("train.") or key == "optim.fused"}
        overrides += [f"{key}={'null' if value is None else value}" for key, value in theirs.items()]
        one_warmup = driver.warms_up_once(run_dir.path)
    else:
        overrides, one_warmup = overrides_of_rounds(command, config, tree)
    training = round_config(config, overrides, tree)
    day = run_config.day_of(config, RunDir(config.run_dir).read_attempts() if config.resume else {})
    preview = partial(RoundPreview, training)
    status = driver.run(config, training, overrides, command, changed, preview, one_warmup=one_warmup, day=day)
    if not config.dry_run and RunDir(config.run_dir).read_metrics():
        _report(config)
    return status


def _report(config: Config) -> None:
    """Plot the metrics of the rounds."""
    from halos.report.__main__ import main as report_on

    report_on([config.run_dir])
