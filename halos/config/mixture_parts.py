"""The parts of loss=mixture, completed by the defaults of config/loss; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from halos.config.suggest import about_loss, nearest
from halos.config.values import show
from halos.errors import UserError
from halos.repository import CONFIG

TARGET = "halos.losses.mixture.mixture"
RESERVED = ("weight", "loss")  # keys of a part; a loss's own key of that name is own_weight there


def is_mixture(loss: Mapping[str, Any] | None) -> bool:
    """Return whether a `loss` node is a mixture's."""
    return bool(loss) and loss.get("_target_") == TARGET  # type: ignore[union-attr]  # of a mapping that is not empty


def completed(loss: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mixture's node whose parts have a `_target_` and every key.

    A part is named after its loss in config/loss, or names it by `loss`, and the keys that it lacks are that YAML's; one with a
    `_target_` is taken as it is. Raises UserError.
    """
    parts = loss.get("parts")
    if not isinstance(parts, Mapping) or not parts:
        raise UserError(
            f"loss.parts takes a mapping of losses to their keys, not {show(parts)}:"
            " 'loss.parts={dpo: {weight: 0.8, beta: 0.1}, sft: {weight: 1}}'"
        )
    return {**loss, "parts": {name: _completed(name, node) for name, node in parts.items()}}


def _completed(name: Any, node: Any) -> dict[str, Any]:
    key = f"loss.parts.{name}"
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"loss.parts: a part cannot be named {name!r}: use letters, digits and _")
    if name == "loss":
        raise UserError("loss.parts: a part cannot be named loss, as metrics loss/... are of all parts: name it otherwise")
    if not isinstance(node, Mapping) or "weight" not in node:
        raise UserError(f"{key} takes a mapping with a weight, and keys of the loss: {{weight: 1}}, not {show(node)}")
    if node.get("_target_") is not None:
        return dict(node)
    loss = node.get("loss", name)
    if not is_plain(loss):
        known = [each.stem for each in (CONFIG / "loss").glob("*.yaml") if is_plain(each.stem)]
        near, explanation = nearest(str(loss), known), about_loss(str(loss))
        hint = f"{explanation}." if explanation else f"did you mean {near}?" if near else "name one of config/loss."
        raise UserError(f"{key}: there is no loss {show(loss)} to mix; {hint} They are {', '.join(sorted(known))}")
    defaults = {f"own_{each}" if each in RESERVED else each: value for each, value in defaults_of(loss).items()}
    return {**defaults, **{each: value for each, value in node.items() if each not in ("loss", "_target_")}}


def keys_of(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the node of a part's loss by itself."""
    own = {each: value for each, value in node.items() if each not in RESERVED}
    return {each.removeprefix("own_") if each.removeprefix("own_") in RESERVED else each: value for each, value in own.items()}


def is_plain(loss: Any) -> bool:
    """Return whether this names a loss of config/loss that is one function, neither a mixture nor an online run."""
    is_there = isinstance(loss, str) and loss.isidentifier() and Path(CONFIG, "loss", f"{loss}.yaml").is_file()
    return is_there and "_target_" in (node := defaults_of(loss)) and not is_mixture(node)


def defaults_of(loss: str) -> dict[str, Any]:
    """Return the node `loss` of a YAML of config/loss, merged over those that it is a variant of."""
    path = Path(CONFIG, "loss", f"{loss}.yaml")
    whole = yaml.safe_load(path.read_text())
    before: dict[str, Any] = {}
    for base in whole.get("defaults", ()):
        before |= defaults_of(base) if base != "_self_" else {}
    return {**before, **(whole.get("loss") or {})}
