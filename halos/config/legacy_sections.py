"""Sections with a `_target_` in earlier versions: `optim` and `schedule` had a `name`, still accepted, and keys were added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from halos.config.values import show
from halos.errors import UserError

OURS = "halos."
# section -> name -> its target now, and the keys that it takes besides the shared ones
NAMES: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "optim": {
        "adamw": ("halos.optimizers.standard.adamw", ("betas", "eps", "fused")),
        "adam": ("halos.optimizers.standard.adam", ("betas", "eps")),
        "sgd": ("halos.optimizers.standard.sgd", ()),
        "rmsprop": ("halos.optimizers.standard.rmsprop", ("eps",)),
    },
    "schedule": {
        "constant": ("halos.schedules.constant", ("warmup",)),
        "linear": ("halos.schedules.linear", ("warmup", "final")),
        "cosine": ("halos.schedules.cosine", ("warmup", "final")),
    },
}
GRPO = "halos.losses.grpo.grpo"
NO_BONUS = {"entropy_coefficient": 0.0, "entropy_target": None, "entropy_step": 0.005, "entropy_most": 1.0}
# keys that a target took later, with the value that a run without them had
ADDED: dict[tuple[str, str], dict[str, Any]] = {
    ("optim", NAMES["optim"]["adamw"][0]): {"fused": False},
    ("loss", GRPO): {"kl_ratio": False, "baseline": "mean", "dual_clip": None, "tau_positive": None, "tau_negative": None,
                     "off_policy_threshold": None, **NO_BONUS},
    ("loss", "halos.losses.ppo.ppo"): {"dual_clip": None, **NO_BONUS},
    ("loss", "halos.losses.rloo.rloo"): {"dual_clip": None, **NO_BONUS},
    ("loss", "halos.losses.reinforce_plus_plus.reinforce_plus_plus"): {"dual_clip": None, **NO_BONUS},
}  # fmt: skip
OWN = {"optim": {"betas", "eps", "fused"}, "schedule": {"warmup", "final"}}  # keys that not every name takes


def with_target(section: str, node: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the node `optim` or `schedule` with a `_target_` instead of a `name`. Raises UserError for an unknown name.

    Keys that this target does not take are dropped as defaults of another choice, unless they are among the `overrides`.
    """
    name, target = node.get("name"), node.get("_target_")
    if name is None or (isinstance(target, str) and not target.startswith(OURS)):
        return dict(node)
    if name not in NAMES[section]:
        raise UserError(
            f"{section}.name takes {', '.join(NAMES[section])}, not {show(name)}; others are chosen as {section}={name}"
        )
    target, takes = NAMES[section][name]
    left = OWN[section] - set(takes) - {key.partition(".")[2] for key in overrides if key.startswith(f"{section}.")}
    return {"_target_": target, **{key: value for key, value in node.items() if key not in {"name", "_target_", *left}}}


def upgrade(settings: dict[str, Any]) -> None:
    """Convert a saved configuration to the form of this version, in place."""
    for section in NAMES:
        if isinstance(settings.get(section), dict):
            settings[section] = with_target(section, settings[section])
    for key, value in added_keys(settings).items():
        section, name = key.split(".")
        settings[section][name] = value


def drop_unread_clip_low(settings: dict[str, Any]) -> None:
    """Drop the lower bound of a ratio from a run that began while objective=cispo did not read it."""
    loss = settings.get("loss")
    if isinstance(loss, dict) and (loss.get("_target_"), loss.get("objective")) == (GRPO, "cispo"):
        loss["clip_low"] = None


def added_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys in ADDED that a saved configuration predates, with their values."""
    missing = {}
    for (section, target), added in ADDED.items():
        node = settings.get(section)
        if isinstance(node, Mapping) and (with_target(section, node) if section in NAMES else node).get("_target_") == target:
            missing |= {f"{section}.{name}": value for name, value in added.items() if name not in node}
    return missing
