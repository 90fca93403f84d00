"""The losses of config/loss as their YAML binds them, and batches made from their signatures alone."""

import importlib
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from torch import Tensor

from halos.config.bind import bind_loss
from halos.types import Labelled, Loss, Mismatched, Pair, PairScores, Rollouts, StepScores, TokenLogps, ValuedRollouts

CONFIG = Path(__file__).parents[2] / "config/loss"
ROWS, WIDTH = 5, 6
# they differ from dpo or ipo by the formula of an item alone, which tests/losses holds
LIKE_DPO = {"robust", "hinge", "exo", "nca", "apo_zero", "apo_down", "sppo", "discopop", "dpop", "dpo_norm", "rpo", "f_dpo",
            "bco_pair"}  # fmt: skip
LIKE_GRPO = {"dapo", "dr_grpo", "max_rl", "opo", "sapo"}  # other keys of the same function; gspo and cispo have own ratios
TAUGHT = ("gkd",)  # losses that need a teacher: a further key, and tests of their own
WHOLE = ("statistics", "state")  # parameters that are the same for every micro-batch of a global batch
KNOWN = (TokenLogps, Pair, Labelled, PairScores, StepScores, Rollouts, ValuedRollouts)  # first parameters that `sample` can make


@dataclass(frozen=True)
class Case:
    """A loss of this package as its YAML binds it."""

    name: str
    settings: dict[str, Any]
    objective: str

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self.settings["_target_"].rpartition(".")[0])

    @property
    def function(self) -> Callable[..., Loss]:
        return vars(self.module)[self.settings["_target_"].rpartition(".")[2]]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return {k: v for k, v in self.settings.items() if k in keywords(self.function)}


def keywords(function: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


def positional(function: Callable[..., Any]) -> dict[str, type]:
    """Names and types of a loss's positional parameters, in order."""
    hints = get_type_hints(function)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name: hints[p.name] for p in inspect.signature(function).parameters.values() if p.kind in kinds}


def of_this_package() -> list[Case]:
    cases = [Case(path.stem, *whole(path)) for path in sorted(CONFIG.glob("*.yaml"))]
    named = [case for case in cases if str(case.settings.get("_target_")).startswith("halos.losses.")]
    return [case for case in named if case.settings.get("parts") != {}]  # a mixture has none until a command gives it some


def names(*, on_rollouts: bool) -> list[str]:
    """Losses on sampled completions, or all the others, but for those that need a teacher."""
    return [
        case.name
        for case in of_this_package()
        if case.name not in TAUGHT and (kind_of(case) in (Rollouts, ValuedRollouts)) is on_rollouts
    ]


def marked(names: Sequence[str], also: Collection[str] = ()) -> list[Any]:
    """For pytest: those that are computed as another of them, and those of `also`, are slow."""
    slow = {*LIKE_DPO, *LIKE_GRPO, *also}
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


def one_of_each_kind(but: Collection[str] = ()) -> list[str]:
    """One loss for each type of first parameter, but for those of the losses in `but`."""
    kinds = {case.name: kind_of(case) for case in of_this_package() if case.name not in TAUGHT}
    left_out = {kinds[name] for name in but}
    return list({kind: name for name, kind in kinds.items() if kind not in left_out}.values())


def kind_of(case: Case) -> type:
    if "parts" in case.settings:
        return bind_loss(case.settings, []).inputs
    return next(iter(positional(case.function).values()))


def whole(path: Path) -> tuple[dict[str, Any], str]:
    """The hyperparameters of a YAML, merged over those of the YAML that it is a variant of; and its objective."""
    node = yaml.safe_load(path.read_text())
    before: tuple[dict[str, Any], str] = ({}, "")
    for name in node.get("defaults", ["_self_"]):
        before = before if name == "_self_" else whole(path.with_name(f"{name}.yaml"))
    return {**before[0], **(node.get("loss") or {})}, (node.get("objective") or {}).get("metric") or before[1]


def sample(kind: type, seed: int) -> Any:
    """A batch of `ROWS` rows of unequal lengths, from 1 token to `WIDTH`."""
    generator = torch.Generator().manual_seed(seed)

    def logps(seed_of_mask: int) -> TokenLogps:
        lengths = torch.randint(1, WIDTH + 1, (ROWS, 1), generator=torch.Generator().manual_seed(seed_of_mask))
        lengths[0] = WIDTH
        mask = torch.arange(WIDTH) < lengths
        return TokenLogps(-3 * torch.rand(ROWS, WIDTH, generator=generator) * mask, mask)

    def per_token() -> Tensor:
        return torch.randn(ROWS, WIDTH, generator=generator) * logps(1).mask

    desirable = torch.tensor([True, False, True, False, False])
    if get_args(kind):
        return sample(get_args(kind)[0], seed)
    if kind in (Rollouts, ValuedRollouts):
        more = {"values": per_token(), "old_values": per_token(), "returns": per_token()} if kind is ValuedRollouts else {}
        old = logps(1).values
        return kind(logps(1), old, per_token(), torch.randn(ROWS, generator=generator), **more)
    if kind is TokenLogps:
        return logps(1)
    if kind is Pair:
        return Pair(logps(1), logps(2))
    if kind is Labelled:
        return Labelled(logps(1), desirable)
    if kind is Mismatched:
        return Mismatched(logps(3))
    if kind is StepScores:
        mask = logps(1).mask
        scores, labels = torch.randn(ROWS, WIDTH, generator=generator), torch.rand(ROWS, WIDTH, generator=generator)
        return StepScores(scores * mask, mask, labels.round(decimals=1) * mask)
    assert kind is PairScores, f"say here how to make a {kind.__name__}"
    chosen, rejected, margin = torch.randn(3, ROWS, generator=generator)
    return PairScores(chosen, rejected, margin.abs())


def inputs(case: Case) -> dict[str, Any]:
    """The loss's positional arguments; `statistics` are those of the whole batch, made by its module's function, and `state` is
    that after a step."""
    made = {}
    for seed, (name, kind) in enumerate(positional(case.function).items()):
        if name == "statistics":
            parameters = positional(case.module.statistics)
            made[name] = case.module.statistics(*[sample(k, 10 + i) for i, k in enumerate(parameters.values())])
        elif name == "state":
            made[name] = after_a_step(case)
        else:
            made[name] = sample(kind, seed)
    return made


def after_a_step(case: Case) -> dict[str, float]:
    kinds, start = positional(case.function), case.module.start()
    before = {name: start if name == "state" else sample(kind, 20 + n) for n, (name, kind) in enumerate(kinds.items())}
    metrics = call(case, before).metrics
    totals = {name: (mean.total.item(), mean.count.item()) for name, mean in metrics.items()}
    legal = keywords(case.module.update)
    return case.module.update(start, totals, **{name: value for name, value in case.settings.items() if name in legal})


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """`change` applied to each tensor or TokenLogps in `value`."""
    if isinstance(value, Tensor | TokenLogps):
        return change(value)
    assert is_dataclass(value)
    return replace(value, **{f.name: mapped(getattr(value, f.name), change) for f in fields(value)})


def rows(given: dict[str, Any], where: slice) -> dict[str, Any]:
    """A micro-batch; what belongs to the global batch stays."""

    def take(part: Tensor | TokenLogps) -> Tensor | TokenLogps:
        return TokenLogps(part.values[where], part.mask[where]) if isinstance(part, TokenLogps) else part[where]

    return {name: value if name in WHOLE else mapped(value, take) for name, value in given.items()}


def leaves(value: Any) -> list[Tensor]:
    """The tensors in `value` that can take a gradient, in order."""
    found: list[Tensor] = []
    mapped(value, lambda part: found.append(part.values if isinstance(part, TokenLogps) else part))
    return [leaf for leaf in found if leaf.is_floating_point()]


def with_gradient(value: Any) -> Any:
    def fresh(part: Tensor | TokenLogps) -> Tensor | TokenLogps:
        if isinstance(part, TokenLogps):
            return TokenLogps(part.values.clone().requires_grad_(), part.mask)
        return part.clone().requires_grad_() if part.is_floating_point() else part

    return mapped(value, fresh)


def call(case: Case, given: dict[str, Any]) -> Loss:
    return case.function(*given.values(), **case.hyperparameters)


def counts(given: dict[str, Any]) -> dict[str, int]:
    """The denominators of a batch, as the trainer counts them in the data."""
    first = next(iter(given.values()))
    first = first.logps if isinstance(first, Rollouts | ValuedRollouts) else first
    sides = [first] if isinstance(first, TokenLogps) else [getattr(first, each.name) for each in fields(first)]
    tokens = {name: int(side.mask.sum()) for name, side in zip(type(first).example.completed, sides, strict=False)
              if isinstance(side, TokenLogps)}  # fmt: skip
    tokens |= {"steps": int(first.mask.sum())} if isinstance(first, StepScores) else {}
    items = len(next(side.values if isinstance(side, TokenLogps) else side for side in sides))
    return {"item": items, "token": sum(tokens.values()), **{f"{name}_token": count for name, count in tokens.items()}}


def mean(loss: Loss, denominators: dict[str, int]) -> Tensor:
    """What the trainer takes the gradient of, for a whole batch or its part in one."""
    return torch.stack([term.values.sum() / denominators[term.per] for term in loss.terms.values()]).sum()
