"""What an evaluation measures, tried on made-up tokens: an objective that is none of it is refused before a model loads."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from halos.config.bind import LossSpec
from halos.config.schema import Config
from halos.config.suggest import nearest
from halos.errors import UserError
from halos.examples import Completion, Item
from halos.rollout.measure import HELD_OUT
from halos.types import Acted, LossInput, Mismatched, RolloutBatch, RolloutInput, Sampled, TokenLogps

ALWAYS = ("loss", "examples")


def refuse_unmeasured(config: Config, loss: LossSpec) -> None:
    """Raises UserError where objective.metric is nothing that an evaluation of this loss gives, by whatever data."""
    metric = config.objective.metric
    names = frozenset(HELD_OUT) if config.online is not None else metrics_of(loss)
    if not config.data.eval or names is None or metric in names:
        return
    near = nearest(metric, names)
    meant = f"did you mean {near}? " if near else ""
    raise UserError(
        f"objective.metric={metric} is not measured with loss={loss.name}: {meant}There are {', '.join(sorted(names))}"
    )


def metrics_of(loss: LossSpec) -> frozenset[str] | None:
    """Names of the held-out metrics of a loss; None where it does not take what is made up, as one of a user's own may not."""
    try:
        names = {*ALWAYS, *loss.function(*_arguments(loss)).metrics}
        if loss.advantages is not None:
            controlled = {"kl_coefficient": loss.settings["kl_coefficient"]} if loss.adapt is not None else {}
            names |= loss.advantages(_sampled(loss), **controlled).metrics.keys()
    except Exception:  # whatever it is, the first evaluation tells of it
        return None
    return frozenset(names | loss.inputs.derived(dict.fromkeys(names, 0.0)).keys())


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
    """Two rows, of two scored tokens in each completion, as the type itself has them of a model's output."""
    if kind is Mismatched:
        return Mismatched(_logps(2))
    assert issubclass(kind, LossInput), "what a loss takes"
    completion, example = Completion(np.zeros(2, np.int32), np.ones(2, bool)), kind.example
    items = [Item(np.zeros(1, np.int32), (completion,) * len(example.completed), str(n), dict.fromkeys(example.labels, float(n)))
             for n in (1, 0)]  # fmt: skip
    logps = _logps(len(kind.rows(items)))
    outputs = {"language": logps, "value": Acted(logps, logps.values), "score": logps.values[:, 0]}
    if issubclass(kind, RolloutInput):
        over_time = logps.values
        batch = RolloutBatch(over_time, over_time[:, 0], over_time, over_time, over_time, over_time, {})
        return kind.of_rollouts(outputs[kind.head], batch)
    return kind.of(outputs[kind.head], items)


def _logps(rows: int) -> TokenLogps:
    """Different ones in each row."""
    return TokenLogps(-torch.arange(1.0, 2 * rows + 1).reshape(rows, 2) / 2, torch.ones(rows, 2, dtype=torch.bool))


def _sampled(loss: LossSpec) -> Sampled:
    logps = _logps(2)
    known: Tensor | None = logps.values if loss.needs_reference else None
    values = logps.values if loss.inputs.head == "value" else None
    return Sampled(torch.tensor([1.0, 0.0]).double(), torch.zeros(2, dtype=torch.int64), logps, known, values)
