"""Which metrics an evaluation yields, found by calling the loss on dummy inputs: other objectives are refused before loading, and
so is a loss that fails on them or depends on padding."""

import inspect
import logging
import math
import traceback
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from halos.config.bind import LossSpec
from halos.config.checkpoint_checks import watches_rewards_of_data
from halos.config.rollout_modules import scorer_class
from halos.config.schema import Config
from halos.config.suggest import nearest
from halos.data.dataset import Dataset
from halos.errors import UserError, first_line_of
from halos.examples import Completion, Item, Stepwise
from halos.repository import PACKAGES
from halos.rollout import evaluation
from halos.run.datasets import eval_sources
from halos.trainers.loss_checks import checked_loss
from halos.types import TOKEN_STATISTICS, Acted, LossInput, Mismatched, RolloutBatch, RolloutInput, Sampled, TokenLogps

ALWAYS = ("loss", "examples")
AT_FAULT = (AttributeError, NameError, TypeError)  # raised by code that other rows would not mend

log = logging.getLogger(__name__)


def refuse_unavailable_objective(config: Config, loss: LossSpec, measuring: Sequence[str]) -> None:
    """Raises UserError if no evaluation yields objective.metric, whatever the data: neither by the loss, nor by the hooks named
    `measuring`, which are not called where there is no evaluation."""
    metric = config.objective.metric
    if (online := config.online) is not None:
        names = frozenset([*evaluation.metric_names(online), *scorer_class(online.scorer.name).metrics(online.scorer)])
    else:
        names = metrics_of(loss)
    sources = [] if online is not None else eval_sources(config)
    refuse_hidden_metrics(sources, names or ())
    if complaint := watches_rewards_of_data(config, loss, sources):
        raise UserError(complaint)
    of_source = next((name for name in sources if metric.removeprefix(f"{name}/") in (names or ())), None)
    if names is None or metric in names or of_source is not None or config.data.has_eval == bool(measuring):
        return
    if measuring:
        raise UserError(
            f"objective.metric={metric} is not measured with loss={loss.name}, and without evaluation data no hook measures:"
            f" give data.eval for hooks.{measuring[0]}"
        )
    near = nearest(metric, [*names, *(f"{source}/{name}" for source in sources for name in names)])
    there = f"did you mean {near}? There are" if near else "there are"
    more = f"; and each of {', '.join(sources)} alone, as {sources[0]}/loss" if sources else ""
    raise UserError(f"objective.metric={metric} is not measured with loss={loss.name}: {there} {', '.join(sorted(names))}{more}")


def refuse_empty_source(config: Config, loss: LossSpec, rows: Dataset) -> None:
    """Raises UserError where objective.metric is of a source of which no row was held out."""
    metric, known = config.objective.metric, metrics_of(loss) or ()
    for number, name in enumerate(rows.names):
        if metric.startswith(f"{name}/") and metric not in known and not (rows.sources == number).any():
            raise UserError(
                f"objective.metric={metric}: no row of {name} is held out (data.eval_fraction={config.data.eval_fraction}):"
                " increase the fraction, or watch another metric"
            )


def refuse_hidden_metrics(sources: Sequence[str], names: Collection[str]) -> None:
    """Raises UserError where a metric of a source would have the name of one over all data."""
    for source in sources:
        if hidden := next((name for name in names if f"{source}/{name}" in names), None):
            raise UserError(
                f"data.eval: {source}/{hidden} would be a metric of the source {source}, and is one over all data: give the entry"
                " another name, {path: ..., name: ...}"
            )


def metrics_of(loss: LossSpec) -> frozenset[str] | None:
    """Return the names of a loss's evaluation metrics; None if it fails on dummy inputs, as a user's own loss may. Raises
    the loss's UserError."""
    try:
        returned = loss.function(*_arguments(loss))
        names = {*ALWAYS, *returned.metrics, *returned.terms}
        if loss.advantages is not None:
            controlled = {"kl_coefficient": loss.settings["kl_coefficient"]} if loss.adapt is not None else {}
            names |= loss.advantages(_sampled(loss), **controlled).metrics.keys()
    except UserError:  # two terms of one name
        raise
    except Exception:  # refuse_failing_loss reports it, whatever it is
        return None
    return frozenset(names | loss.derive(dict.fromkeys(names, 0.0)).keys())


def refuse_failing_loss(loss: LossSpec) -> None:
    """Call the loss as a step does. Raises UserError where what it returns is wrong, and where its code is: an error of another
    kind, or with an input type of the user's own, is a warning, since the rows of the run may have what dummy ones lack."""
    try:
        arguments = _arguments(loss, padding=1, learned=True)  # so that no row is as long as there are rows
        returned = loss.function(*arguments)
    except UserError:
        raise
    except Exception as error:
        what = f"the loss {loss.name} raises an error on made-up rows, in {_place(error)}: {first_line_of(error)}"
        if isinstance(error, AT_FAULT) and loss.inputs.__module__.partition(".")[0] == "halos":
            raise UserError(what) from error
        log.warning("%s; the first step tells whether it does on those of the run", what)
        return
    checked_loss(returned, f"{loss.name}{_file(loss)}", arguments[0], 2)


def _place(error: Exception) -> str:
    """Return the last line outside this package and libraries from which an error came, `mylosses/mine.py:7`."""
    frames, ours = traceback.extract_tb(error.__traceback__), str(PACKAGES / "halos")
    outside = [each for each in frames if "site-packages" not in each.filename and not each.filename.startswith(ours)]
    last = (outside or frames)[-1]
    return f"{last.filename}:{last.lineno}"


def _file(loss: LossSpec) -> str:
    """Return where the code of a loss is, in brackets; empty where it has none."""
    code = getattr(inspect.unwrap(getattr(loss.function, "func", loss.function)), "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if code else ""


def refuse_padded_loss(loss: LossSpec) -> None:
    """Raises UserError where a loss of the same rows changes with the width that they are padded to, and so with the rows beside
    them. One that fails on dummy inputs or draws random numbers is not judged."""
    try:
        with torch.no_grad():
            sums = [float(loss.function(*_arguments(loss, padding)).values.sum()) for padding in (0, 0, 1)]
    except Exception:  # as in `metrics_of`
        return
    if sums[0] == sums[1] and not math.isclose(sums[0], sums[2], rel_tol=1e-5, abs_tol=1e-6):
        raise UserError(
            f"the loss {loss.name} depends on padding: with one more masked position in each row its sum is {sums[2]:g}, not"
            f" {sums[0]:g}. Use `sum`, `mean` and `length` of TokenLogps, or multiply values of tokens by its `mask`"
        )


def _arguments(loss: LossSpec, padding: int = 0, *, learned: bool = False) -> list[Any]:
    """Return dummy arguments for the loss: two sequences of two tokens of each type that it takes, and `padding`; the first with
    gradients where it is `learned`."""
    reference_type = TokenLogps if loss.on_rollouts else loss.inputs
    needed = loss.takes_reference and loss.needs_reference
    more: list[Any] = [dummy(reference_type, padding, (), loss.candidates)] if needed else [*loss.unneeded]
    if loss.statistics is not None:
        statistics_type = loss.statistics_inputs or loss.inputs
        references = [dummy(statistics_type, padding)] if loss.needs_reference else loss.unneeded
        more.append(loss.statistics(dummy(statistics_type, padding), *references))
    more += [loss.start] if loss.start is not None else []
    return [dummy(loss.inputs, padding, loss.token_statistics, loss.candidates, learned=learned), *more]


def dummy(
    kind: type, padding: int = 0, statistics: Sequence[str] = TOKEN_STATISTICS, candidates: int = 0, *, learned: bool = False
) -> Any:  # fmt: skip
    """Return an instance of an input type: two examples with two scored tokens per completion, built by the type itself."""
    if kind is Mismatched:
        return Mismatched(_logps(2, padding))
    assert issubclass(kind, LossInput), "a loss takes no other type"
    completion, example = Completion(np.zeros(2, np.int32), np.ones(2, bool)), kind.example
    items = [Item(np.zeros(1, np.int32), (completion,) * len(example.completed), str(n), dict.fromkeys(example.labels, float(n)),
                  step_labels=np.array([n, 1 - n], np.float32) if issubclass(example, Stepwise) else None)
             for n in (1, 0)]  # fmt: skip
    logps = _logps(len(kind.rows(items)), padding, statistics, candidates, learned=learned)
    outputs = {"language": logps, "value": Acted(logps, logps.values), "score": logps.values[:, 0],
               "steps": torch.stack([torch.zeros_like(logps.values), logps.values], -1)}  # fmt: skip
    if issubclass(kind, RolloutInput):
        over_time = logps.values.detach()
        batch = RolloutBatch(over_time, over_time, over_time[:, 0], over_time, over_time, over_time, over_time, {})
        return kind.of_rollouts(outputs[kind.head], batch)
    return kind.of(outputs[kind.head], items)


def _logps(
    rows: int, padding: int = 0, statistics: Sequence[str] = TOKEN_STATISTICS, candidates: int = 0, *, learned: bool = False
) -> TokenLogps:  # fmt: skip
    """Return dummy log-probs that differ between sequences, with so many positions of padding."""
    values, mask = -torch.arange(1.0, 2 * rows + 1).reshape(rows, 2) / 2, torch.ones(rows, 2, dtype=torch.bool)
    values = values * 1.25 if learned else values  # of zeros, as where policy and reference are equal, no gradient is asked
    values, mask = F.pad(values, (0, padding)).requires_grad_(learned), F.pad(mask, (0, padding))
    further = values[..., None].expand(*values.shape, candidates) - math.log(candidates + 1) if candidates else None
    return TokenLogps(
        values, mask, candidates=further, **{name: -values / 2 if name == "entropy" else values for name in statistics}
    )


def _sampled(loss: LossSpec) -> Sampled:
    logps = _logps(2)
    reference: Tensor | None = logps.values if loss.needs_reference else None
    values = logps.values if loss.inputs.head == "value" else None
    return Sampled(torch.tensor([1.0, 0.0]).double(), torch.zeros(2, dtype=torch.int64), logps, reference, values)
