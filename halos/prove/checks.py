"""What is proved of a run's forward on a small copy, each against the model's own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from halos.logps.hidden import accepted, backbone_of
from halos.logps.model import ActorCritic, adapter_off
from halos.prove.trial import FLOOR, HALF_MARGIN, MARGIN, Check, Stage, Trial
from halos.types import Acted

MIDDLE = 1  # the row with a neighbour on either side


def prove(trial: Trial) -> tuple[Stage, list[Check]]:
    """Every check that is of this run, those that fail among them: in float32 first, and in the run's own arithmetic."""
    stage = Stage(trial)
    exact = [replace(check, what=f"{check.what} in float32") for check in _all(Stage(trial.in_float32()))] if trial.half else []
    return stage, [*exact, *_all(stage)]


def _all(stage: Stage) -> Iterator[Check]:
    for check in (*(_of_scores(stage) if stage.trial.reward else _of_policy(stage)), *_of_borders(stage)):
        yield replace(check, what=f"{check.what}, with {stage.adapted}") if stage.adapted else check


# --- numbers ---------------------------------------------------------------------------------------------------------


def _of_policy(stage: Stage) -> Iterator[Check]:
    own = partial(_plain_logps, stage)
    trained = _truth(stage, stage.model, own)
    yield trained.check("log-probs", _logps(stage, stage.said()))
    alone = [_logps(stage, stage.said([number]), [number]) for number in range(len(stage.rows))]
    yield trained.check("log-probs of each row by itself", torch.cat(alone))
    if isinstance(stage.module, ActorCritic):
        values = _truth(stage, stage.model, partial(_plain_values, stage))
        yield values.check("values", _logps(stage, stage.said(), of_head=True))
    if stage.trial.refers:
        with adapter_off(stage.module):
            reference = _logps(stage, stage.said())
        yield _truth(stage, stage.base, own).check("the reference's log-probs", reference)
        yield trained.check("log-probs after the reference's", _logps(stage, stage.said()))


def _of_scores(stage: Stage) -> Iterator[Check]:
    def own(model: Any, ids: Tensor, _: int) -> Tensor:
        return model(input_ids=ids, **accepted(type(model), use_cache=False)).logits[0, :1]

    trained = _truth(stage, stage.model, own)
    yield trained.check("scores", stage.said().double())
    alone = [stage.said([number]).double() for number in range(len(stage.rows))]
    yield trained.check("scores of each row by itself", torch.cat(alone))


@dataclass(frozen=True, slots=True)
class _Truth:
    """What a model itself says, in float64; and how far something else may be from it."""

    exact: Tensor
    allowed: float
    distance: Callable[[Tensor, Tensor], float]

    def check(self, what: str, found: Tensor) -> Check:
        return Check(what, self.distance(found, self.exact), self.allowed)


def _truth(stage: Stage, model: PreTrainedModel, own: Callable[[PreTrainedModel, Tensor, int], Tensor]) -> _Truth:
    """Allowed is some times how far the model's own forward, in the run's arithmetic, is from itself in float64."""
    exact, plain = (stage.expected(model, own, exact=exact) for exact in (True, False))
    half = stage.trial.half
    distance = _typical if half else _largest
    allowed = max((HALF_MARGIN if half else MARGIN) * distance(plain, exact), FLOOR * exact.abs().max().item())
    return _Truth(exact, allowed, distance)


def _largest(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().nan_to_num(float("inf")).item() if one.shape == other.shape else float("inf")


def _typical(one: Tensor, other: Tensor) -> float:
    return (one - other).square().mean().sqrt().nan_to_num(float("inf")).item() if one.shape == other.shape else float("inf")


def _plain_logps(stage: Stage, model: Any, ids: Tensor, number: int) -> Tensor:
    """Of the scored tokens of row `number`: log softmax(logits / temperature), from the model's whole logits."""
    logits = model(input_ids=ids, **accepted(type(model), use_cache=False)).logits[0].double() / stage.trial.temperature
    at = _scored(stage, number)
    return torch.stack([logits[place - 1].log_softmax(-1)[ids[0, place]] for place in at])


def _plain_values(stage: Stage, model: Any, ids: Tensor, number: int) -> Tensor:
    """Of the states from which the scored tokens of row `number` are predicted."""
    seen: list[Tensor] = []
    backbone = backbone_of(model)
    assert backbone is not None

    def keep(*given: Any) -> None:
        seen.append(given[2].last_hidden_state)

    hook = backbone.register_forward_hook(keep)
    model(input_ids=ids, **accepted(type(model), use_cache=False))
    hook.remove()
    assert isinstance(stage.module, ActorCritic)
    head = stage.module.value_head
    states = torch.stack([seen[0][0, place - 1] for place in _scored(stage, number)]).double()
    return linear(states, head.weight.double(), head.bias.double())[:, 0]


def _scored(stage: Stage, number: int) -> list[int]:
    """Where in row `number` the tokens stand that are scored; nothing comes before a first one."""
    prompt, completion = stage.rows[number]
    return [len(prompt) + place for place, counts in enumerate(completion.scored) if counts and len(prompt) + place > 0]


def _logps(stage: Stage, output: Any, which: list[int] | None = None, *, of_head: bool = False) -> Tensor:
    """What a module said of the scored tokens of some rows, one row after the other; nothing where it marks others as scored."""
    logps = output.logps if isinstance(output, Acted) else output
    values = output.values if of_head else logps.values
    parts = []
    for place, number in enumerate(range(len(stage.rows)) if which is None else which):
        count = len(_scored(stage, number))
        if logps.mask[place].tolist() != [column < count for column in range(logps.mask.shape[1])]:
            return values.new_zeros(0)
        parts.append(values[place, :count])
    return torch.cat(parts).double()


# --- borders ---------------------------------------------------------------------------------------------------------


def _of_borders(stage: Stage) -> Iterator[Check]:
    """Nothing of a neighbour reaches a row. By gradient without a tolerance; by value but for the rounding that comes with
    another load of each expert."""
    embedded: list[Tensor] = []

    def keep(*given: Any) -> Tensor:
        embedded.append(given[2].detach().requires_grad_())
        return embedded[-1]

    hook = stage.model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad(), stage.arithmetic():
            numbers = _row(stage.module(stage.packed()), MIDDLE)
            weights = torch.linspace(1, 2, len(numbers), device=numbers.device)
            gradients = torch.autograd.grad((numbers * weights).sum(), embedded, allow_unused=True)
    finally:
        hook.remove()
    whole = torch.cat([
        (torch.zeros_like(states) if gradient is None else gradient).reshape(-1, states.shape[-1])
        for states, gradient in zip(embedded, gradients, strict=True)
    ])  # fmt: skip
    lengths = stage.packed().lengths
    own, others = _parted(whole, lengths)
    reached = others.abs().max().item() if own.any() and len(whole) == sum(lengths) else float("inf")
    yield Check("gradient of a row with respect to its neighbours", reached, 0.0)
    other = stage.packed()
    marks = _parted(torch.arange(sum(lengths)), lengths)[1]
    other.ids[marks] = other.ids[marks].flip(0)
    with torch.no_grad(), stage.arithmetic():
        change = (_row(stage.module(other), MIDDLE) - numbers).abs().max().item()
    allowed = (1e-2 if stage.trial.half else FLOOR) * numbers.abs().max().item()
    yield Check("change of a row with its neighbours' tokens", change, allowed)


def _parted(flat: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What is of the row in the middle, and the rest."""
    begin, end = list(accumulate(lengths, initial=0))[MIDDLE : MIDDLE + 2]
    return flat[begin:end], torch.cat([flat[:begin], flat[end:]])


def _row(output: Any, number: int) -> Tensor:
    """All that a module said of a row."""
    if isinstance(output, Tensor):
        return output[number : number + 1]
    logps = output.logps if isinstance(output, Acted) else output
    parts = [logps.values, *([output.values] if isinstance(output, Acted) else [])]
    return torch.cat([part[number][logps.mask[number]] for part in parts])
