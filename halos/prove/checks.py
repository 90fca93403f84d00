"""The checks of a run's forward on a small copy of its model, each against the model's own forward."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from halos.logps.hidden import accepted, backbone_of
from halos.logps.model import ActorCritic
from halos.logps.modes import adapter_off
from halos.prove.small_copy import FLOOR, HALF_MARGIN, MARGIN, SAME_PROMPT, Check, ForwardSpec, SmallCopy
from halos.reward_kind import RewardKind
from halos.types import Acted, Sequences


def prove(spec: ForwardSpec) -> tuple[SmallCopy, list[Check]]:
    """All checks that apply to this run, failed ones included: first in float32, then in the run's own precision."""
    copy = SmallCopy(spec)
    exact = _all(SmallCopy(spec.in_float32())) if spec.half else ()
    return copy, [*(replace(check, what=f"{check.what} in float32") for check in exact), *_all(copy)]


def _all(copy: SmallCopy) -> Iterator[Check]:
    for check in (*OF_HEAD[copy.spec.reward](copy), *_of_leaks(copy)):
        yield replace(check, what=f"{check.what}, with {copy.adapted}") if copy.adapted else check


# --- values ----------------------------------------------------------------------------------------------------------


def _of_policy(copy: SmallCopy) -> Iterator[Check]:
    own = partial(_plain_logps, copy)
    trained = _expected(copy, copy.model, own)
    yield trained.check("log-probs", _logps(copy, copy.output()))
    alone = [_logps(copy, copy.output([number]), [number]) for number in range(len(copy.rows))]
    yield trained.check("log-probs of each row by itself", torch.cat(alone))
    if isinstance(copy.module, ActorCritic):
        values = _expected(copy, copy.model, partial(_plain_values, copy))
        yield values.check("values", _logps(copy, copy.output(), of_head=True))
    if copy.spec.refers:
        with adapter_off(copy.module):
            reference = _logps(copy, copy.output())
        yield _expected(copy, copy.base, own).check("the reference's log-probs", reference)
        yield trained.check("log-probs after the reference's", _logps(copy, copy.output()))


def _of_scores(copy: SmallCopy) -> Iterator[Check]:
    def own(model: Any, ids: Tensor, _: int) -> Tensor:
        return model(input_ids=ids, **accepted(type(model), use_cache=False)).logits[0, :1]

    trained = _expected(copy, copy.model, own)
    yield trained.check("scores", copy.output().double())
    alone = [copy.output([number]).double() for number in range(len(copy.rows))]
    yield trained.check("scores of each row by itself", torch.cat(alone))


def _of_steps(copy: SmallCopy) -> Iterator[Check]:
    def own(model: Any, ids: Tensor, number: int) -> Tensor:
        return model(input_ids=ids, **accepted(type(model), use_cache=False)).logits[0, _scored(copy, number)]

    def logits(output: Tensor, which: Sequence[int]) -> Tensor:
        """At ends of steps; empty where positions beyond a row's last step are not 0."""
        counts = [len(_scored(copy, number)) for number in which]
        if any(bool(row[count:].any()) for row, count in zip(output, counts, strict=True)):
            return output.new_zeros(0)
        return torch.cat([row[:count] for row, count in zip(output, counts, strict=True)]).double()

    trained, numbers = _expected(copy, copy.model, own), range(len(copy.rows))
    yield trained.check("logits of steps", logits(copy.output(), numbers))
    yield trained.check("logits of each row by itself", torch.cat([logits(copy.output([n]), [n]) for n in numbers]))


OF_HEAD = {None: _of_policy, RewardKind.OUTCOME: _of_scores, RewardKind.PROCESS: _of_steps}


@dataclass(frozen=True, slots=True)
class _Expected:
    """A model's own output in float64, and the tolerance for other ways to compute it."""

    exact: Tensor
    allowed: float
    distance: Callable[[Tensor, Tensor], float]

    def check(self, what: str, output: Tensor) -> Check:
        return Check(what, self.distance(output, self.exact), self.allowed)


def _expected(copy: SmallCopy, model: PreTrainedModel, own: Callable[[PreTrainedModel, Tensor, int], Tensor]) -> _Expected:
    """The tolerance is a multiple of the distance between the model's own forward in the run's precision and in float64."""
    exact, plain = (copy.expected(model, own, exact=exact) for exact in (True, False))
    half = copy.spec.half
    distance = _rms if half else _max
    allowed = max((HALF_MARGIN if half else MARGIN) * distance(plain, exact), FLOOR * exact.abs().max().item())
    return _Expected(exact, allowed, distance)


def _max(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().nan_to_num(float("inf")).item() if one.shape == other.shape else float("inf")


def _rms(one: Tensor, other: Tensor) -> float:
    return (one - other).square().mean().sqrt().nan_to_num(float("inf")).item() if one.shape == other.shape else float("inf")


def _plain_logps(copy: SmallCopy, model: Any, ids: Tensor, number: int) -> Tensor:
    """log softmax(logits / temperature) at the scored tokens of row `number`, from the model's full logits."""
    logits = model(input_ids=ids, **accepted(type(model), use_cache=False)).logits[0].double() / copy.spec.temperature
    at = _scored(copy, number)
    return torch.stack([logits[index - 1].log_softmax(-1)[ids[0, index]] for index in at])


def _plain_values(copy: SmallCopy, model: Any, ids: Tensor, number: int) -> Tensor:
    """Values of the states from which the scored tokens of row `number` are predicted."""
    states: list[Tensor] = []
    backbone = backbone_of(model)
    assert backbone is not None

    def keep(*arguments: Any) -> None:
        states.append(arguments[2].last_hidden_state)

    hook = backbone.register_forward_hook(keep)
    model(input_ids=ids, **accepted(type(model), use_cache=False))
    hook.remove()
    assert isinstance(copy.module, ActorCritic)
    head = copy.module.value_head
    predicting = torch.stack([states[0][0, index - 1] for index in _scored(copy, number)]).double()
    return linear(predicting, head.weight.double(), head.bias.double())[:, 0]


def _scored(copy: SmallCopy, number: int) -> list[int]:
    """Indices of the scored tokens in row `number`; the first token of a row is never one, since nothing predicts it."""
    prompt, completion = copy.rows[number]
    return [len(prompt) + n for n, is_scored in enumerate(completion.scored) if is_scored and len(prompt) + n > 0]


def _logps(copy: SmallCopy, output: Any, which: list[int] | None = None, *, of_head: bool = False) -> Tensor:
    """A module's log-probs (or values) of the scored tokens of some rows, concatenated; empty where its mask marks others."""
    logps = output.logps if isinstance(output, Acted) else output
    values = output.values if of_head else logps.values
    parts = []
    for row, number in enumerate(range(len(copy.rows)) if which is None else which):
        count = len(_scored(copy, number))
        if logps.mask[row].tolist() != [column < count for column in range(logps.mask.shape[1])]:
            return values.new_zeros(0)
        parts.append(values[row, :count])
    return torch.cat(parts).double()


# --- leaks -----------------------------------------------------------------------------------------------------------


def _of_leaks(copy: SmallCopy) -> Iterator[Check]:
    """The checks of both rows that have one prompt: where it is shared, either is a branch beside the other."""
    for row in SAME_PROMPT:
        yield from _of_leaks_into(copy, row)


def _of_leaks_into(copy: SmallCopy, row: int) -> Iterator[Check]:
    """A row must not depend on its neighbours: its gradient with respect to them is exactly 0, and its values change by no more
    than the rounding that comes from another load of each expert."""
    embedded: list[Tensor] = []

    def keep(*arguments: Any) -> Tensor:
        embedded.append(arguments[2].detach().requires_grad_())
        return embedded[-1]

    hook = copy.model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad(), copy.arithmetic():
            values = _row(copy.module(copy.packed()), row)
            weights = torch.linspace(1, 2, len(values), device=values.device)
            gradients = torch.autograd.grad((values * weights).sum(), embedded, allow_unused=True)
    finally:
        hook.remove()
    whole = torch.cat([
        (torch.zeros_like(states) if gradient is None else gradient).reshape(-1, states.shape[-1])
        for states, gradient in zip(embedded, gradients, strict=True)
    ])  # fmt: skip
    is_own = _is_own(copy.packed(), row).to(whole.device)
    is_read = len(whole) == len(is_own) and bool(whole[is_own].any())
    reached = whole[~is_own].abs().max().item() if is_read else float("inf")
    yield Check("gradient of a row with respect to its neighbours", reached, 0.0)
    changed = copy.packed()
    neighbours = (~is_own).nonzero()[:, 0].to(changed.ids.device)
    changed.ids[neighbours] = changed.ids[neighbours].flip(0)
    with torch.no_grad(), copy.arithmetic():
        change = (_row(copy.module(changed), row) - values).abs().max().item()
    allowed = (1e-2 if copy.spec.half else FLOOR) * values.abs().max().item()
    yield Check("change of a row with its neighbours' tokens", change, allowed)


def _is_own(batch: Sequences, row: int) -> Tensor:
    """Which of the packed tokens belong to a row, its prompt's included: (tokens,) bool."""
    own, numbers = list[bool](), iter(batch.leaves)
    for trunk, *branches in batch.trees:
        rows = [next(numbers) for _ in branches or (None,)]
        own += [row in rows] * trunk
        for number, branch in zip(rows, branches, strict=False):
            own += [number == row] * branch
    return torch.tensor(own)


def _row(output: Any, number: int) -> Tensor:
    """A module's outputs for one row: its score, its logits of steps, or its log-probs and values, flattened."""
    if isinstance(output, Tensor):
        return output[number : number + 1].flatten()
    logps = output.logps if isinstance(output, Acted) else output
    parts = [logps.values, *([output.values] if isinstance(output, Acted) else [])]
    return torch.cat([part[number][logps.mask[number]] for part in parts])
