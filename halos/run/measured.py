"""What an evaluation measures, tried on made-up tokens: an objective that is none of it is refused before a model loads."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from halos.config.bind import LossSpec
from halos.config.schema import Config
from halos.config.suggest import nearest
from halos.errors import UserError
from halos.rollout.measure import HELD_OUT
from halos.types import Labelled, Mismatched, Pair, PairScores, Rollouts, Sampled, TokenLogps, ValuedRollouts

ALWAYS = ("loss", "examples")
Derived = Callable[[Mapping[str, float]], dict[str, float]]


def refuse_unmeasured(config: Config, loss: LossSpec, derived: Derived) -> None:
    """Raises UserError where objective.metric is nothing that an evaluation of this loss gives, by whatever data."""
    metric = config.objective.metric
    names = frozenset(HELD_OUT) if config.online is not None else metrics_of(loss, derived)
    if not config.data.eval or names is None or metric in names:
        return
    near = nearest(metric, names)
    meant = f"did you mean {near}? " if near else ""
    raise UserError(
        f"objective.metric={metric} is not measured with loss={loss.name}: {meant}There are {', '.join(sorted(names))}"
    )


def metrics_of(loss: LossSpec, derived: Derived) -> frozenset[str] | None:
    """Names of the held-out metrics of a loss; None where it does not take what is made up, as one of a user's own may not."""
    try:
        names = {*ALWAYS, *loss.function(*_arguments(loss)).metrics}
        if loss.advantages is not None:
            controlled = {"kl_coefficient": loss.settings["kl_coefficient"]} if loss.adapt is not None else {}
            names |= loss.advantages(_sampled(loss), **controlled).metrics.keys()
    except Exception:  # whatever it is, the first evaluation tells of it
        return None
    return frozenset(names | derived(dict.fromkeys(names, 0.0)).keys())


def _arguments(loss: LossSpec) -> list[Any]:
    """Two rows of two tokens, of each type that the loss takes."""
    against = TokenLogps if loss.on_rollouts else loss.inputs
    more = [made_up(against) if loss.needs_reference else None] if loss.takes_reference else []
    if loss.statistics is not None:
        given = loss.statistics_inputs or loss.inputs
        references = [made_up(given)] if loss.needs_reference else []
        more.append(loss.statistics(made_up(given), *references))
    return [made_up(loss.inputs), *more]


def made_up(kind: type) -> Any:
    tokens, rows = torch.tensor([[-1.0, -2.0], [-0.5, -0.25]]), torch.tensor([1.0, 0.0])
    logps = TokenLogps(tokens, torch.ones(2, 2, dtype=torch.bool))
    made: dict[type, Callable[[], Any]] = {
        TokenLogps: lambda: logps,
        Mismatched: lambda: Mismatched(logps),
        Pair: lambda: Pair(logps, logps),
        Labelled: lambda: Labelled(logps, rows > 0),
        PairScores: lambda: PairScores(rows, -rows, rows),
        Rollouts: lambda: Rollouts(logps, tokens, tokens, rows),
        ValuedRollouts: lambda: ValuedRollouts(logps, tokens, tokens, rows, tokens, tokens, tokens),
    }
    return made[kind]()


def _sampled(loss: LossSpec) -> Sampled:
    logps = made_up(TokenLogps)
    known: Tensor | None = logps.values if loss.needs_reference else None
    values = logps.values if loss.inputs.head == "value" else None
    return Sampled(torch.tensor([1.0, 0.0]).double(), torch.zeros(2, dtype=torch.int64), logps, known, values)
