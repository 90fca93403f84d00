"""From the names on the command line to losses, with the numbers that are worked for them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import halos.losses
from halos.certify import modifier, worked
from halos.certify.modifier import MODIFIER
from halos.certify.worked import Worked
from halos.config.bind import LossSpec, bind_loss
from halos.config.mixture_parts import is_mixture
from halos.config.suggest import nearest
from halos.errors import UserError, user_errors
from halos.repository import CONFIG
from halos.trainers.humanline import Humanline

OURS = Path(halos.losses.__file__).parent / "worked.yaml"
SHAPE = "a mapping with `examples`, a list, and optionally `exempt`, a mapping; or several of them under names of losses"


@dataclass(frozen=True)
class Named:
    """A loss as it is named, and what is worked for it; and the same of humanline where the loss is proved under it."""

    name: str
    target: str
    spec: LossSpec
    worked: Worked
    humanline: Humanline | None = None
    modifier: Worked = field(default_factory=Worked)


def choices() -> list[str]:
    """The losses of config/loss that `all` stands for: those with a function, of mixtures those with parts."""
    return [name for name in _names() if not is_mixture(node := _choice(name)) or node["parts"]]


def _names() -> list[str]:
    names = sorted(path.stem for path in (CONFIG / "loss").glob("*.yaml"))
    return [name for name in names if "_target_" in _choice(name)]


def named(name: str, overrides: Mapping[str, Any], plugins: Sequence[str], examples: Path | None) -> Named:
    """A loss of config/loss, or the function at a dotted path. Raises UserError where it does not exist or cannot be bound."""
    known = _names()
    if "." not in name and name not in known:
        if (CONFIG / "loss" / f"{name}.yaml").is_file():
            raise UserError(f"{name} is a loop, whose loss is {name}.loss: certify that by its own name, such as dpo")
        near = nearest(name, known)
        raise UserError(f"there is no loss {name!r}{f': did you mean {near}?' if near else '.'} There are {', '.join(known)};"
                        " a loss of yours is the dotted path of its function, with --plugins its package")  # fmt: skip
    package = name.partition(".")[0]
    if name not in known and package not in ("halos", *plugins):
        raise UserError(f"{name} is outside halos: if you trust that package, add --plugins {package}")
    keys, bounds = modifier.split(overrides, _read(CONFIG / MODIFIER / "on.yaml")[MODIFIER])
    settings = {**(_choice(name) if name in known else {"_target_": name}), **keys}
    spec = bind_loss(settings, plugins)
    humanline = modifier.modifier_of(bounds, spec)
    numbers = _worked(name, spec, examples)
    if humanline is None:
        plain = [each for each in numbers.examples if MODIFIER not in each]
        return Named(name, str(settings["_target_"]), spec, Worked(plain, numbers.exempt))
    return Named(name, str(settings["_target_"]), spec, numbers, humanline, Worked(**_read(OURS)[MODIFIER]))


def _choice(name: str) -> dict[str, Any]:
    """The node `loss` of a YAML, over that of the YAML that it is a variant of."""
    node = _read(CONFIG / "loss" / f"{name}.yaml")
    before: dict[str, Any] = {}
    for other in node.get("defaults", ()):
        before = before if other == "_self_" or not isinstance(other, str) else _choice(other)
    return {**before, **(node.get("loss") or {})}


@cache
def _read(path: Path) -> dict[str, Any]:
    with user_errors(f"{path} cannot be read"):
        text = path.read_text(encoding="utf-8")
        try:
            node = yaml.safe_load(text)
        except yaml.MarkedYAMLError as error:
            line = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
            raise UserError(f"{path}{line}: this is not YAML, in which worked examples are {SHAPE}") from error
    if not isinstance(node, dict):
        raise UserError(f"{path} holds a {type(node).__name__}: {SHAPE}")
    return node


def _worked(name: str, spec: LossSpec, file: Path | None) -> Worked:
    """From the file given; else what the module declares; for losses of halos, from their file."""
    module = sys.modules[worked.function_of(spec).__module__]
    if file is not None:
        node = _read(file)
        node = node.get(name) or node.get(spec.name) or node
    elif "EXAMPLES" in vars(module):
        node = {"examples": vars(module)["EXAMPLES"], "exempt": vars(module).get("EXEMPT", {})}
    else:
        node = _read(OURS).get(spec.name, {}) if module.__name__.startswith("halos.") else {}
    examples, exempt = node.get("examples", []), node.get("exempt", {})
    if (
        not isinstance(examples, list)
        or not all(isinstance(each, Mapping) for each in examples)
        or not isinstance(exempt, Mapping)
    ):
        raise UserError(f"the worked examples of {name} are not {SHAPE}")
    for example in examples:
        worked.legal(spec, example)
    return Worked(examples, exempt)
