"""Tries the variable-length kernel on the device of a run: random trees, against attention one sequence at a time."""

import logging
import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from halos.logps import varlen
from halos.logps.attention import attend_by_tree
from halos.types import Tree

log = logging.getLogger(__name__)

CASES = ((64, None, 1.0), (128, 40, 0.7), (256, None, 1.0))  # size of a head, window, and times the usual scale
HEADS, KV_HEADS = 4, 2
BOUND = 2e-2  # of relative errors in bfloat16: rounding is 2e-3 of outputs and 5e-3 of gradients

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@cache
def why_not(device: torch.device) -> str | None:
    """The reason why the kernel is not to be used on this device, logged once; None where it is right."""
    try:
        with torch.device("cpu"), torch.enable_grad():  # whatever a load is in
            why = next(filter(None, (_wrong(number, *case, device) for number, case in enumerate(CASES))), None)
    except ImportError:
        why = f"is not in torch {torch.__version__}"
    except Exception as error:  # whatever torch, a driver or a card raises
        why = f"does not run here: {(str(error).splitlines() or [''])[0] or type(error).__name__}"
    if why is not None:
        log.info("packed sequences attend one at a time on this device, since torch's varlen kernel %s", why)
    return why


def _wrong(seed: int, size: int, window: int | None, scaled: float, device: torch.device) -> str | None:
    """What is wrong with the kernel's output and gradients for some random trees."""
    trees = random_trees(seed)
    inputs = [each.bfloat16() for each in random_inputs(trees, seed, size)]
    scale = scaled * size**-0.5
    ours = partial(varlen.attend, trees=trees, scale=scale, window=window)
    on_device = [each.to(device) for each in inputs]
    alone = partial(_one_at_a_time, trees=trees, window=window, scale=scale)
    exact = _with_gradients(alone, [each.float() for each in inputs])
    for name, mine, theirs in zip(("output", "queries", "keys", "values"), _with_gradients(ours, on_device), exact, strict=True):
        error = _largest_error(mine.cpu().float(), theirs, trees)
        if not error <= BOUND:
            what = "its output" if name == "output" else f"the gradient of its {name}"
            return f"is not exact: {what} is {error:.1g} off for heads of {size}{f' and a window of {window}' if window else ''}"
    return "lets branches read each other" if _leaks(ours, on_device, trees) else None


def random_trees(seed: int) -> tuple[Tree, ...]:
    """Trees of several branches, of one and of none, shorter and longer than a kernel's blocks of 64 or 128 tokens."""
    draw = random.Random(seed)
    branches = [3, 1, 0, 2, draw.randint(2, 4)]
    draw.shuffle(branches)
    return tuple((draw.randint(1, 200), *(draw.randint(1, 150) for _ in range(each))) for each in branches)


def random_inputs(trees: Sequence[Tree], seed: int, size: int) -> list[Tensor]:
    """Query, key and value, (1, heads, tokens, size) on the CPU, with the strides of a model's projections."""
    generator, total = torch.Generator().manual_seed(seed), sum(map(sum, trees))
    return [torch.randn(1, total, heads, size, generator=generator).transpose(1, 2) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def _one_at_a_time(
    query: Tensor, key: Tensor, value: Tensor, *, trees: tuple[Tree, ...], window: int | None, scale: float
) -> Tensor:
    return attend_by_tree(nn.Module(), query, key, value, None, scaling=scale, sliding_window=window, trees=trees)[0]


def _with_gradients(attention: Attention, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it with respect to query, key and value, each (tokens, heads, size)."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    output = attention(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(output, leaves, weights.to(output))
    return [output.detach()[0], *(each[0].transpose(0, 1) for each in gradients)]


def _largest_error(ours: Tensor, exact: Tensor, trees: Sequence[Tree]) -> float:
    """The largest root mean square error of a trunk's or a branch's tokens, relative to that of their exact values, or of all
    where theirs are smaller: the gradients of a first query are 0."""
    if not bool(ours.isfinite().all()):
        return float("inf")
    sizes, of_all = [part for tree in trees for part in tree], exact.square().mean()
    parts = zip((ours - exact).split(sizes), exact.split(sizes), strict=True)
    return max((wrong.square().mean() / torch.maximum(own.square().mean(), of_all)).sqrt().item() for wrong, own in parts)


def _leaks(attention: Attention, inputs: Sequence[Tensor], trees: Sequence[Tree]) -> bool:
    """Whether another token's output changes by a bit with the tokens of a branch."""
    ends = [0, *accumulate(part for tree in trees for part in tree)]
    first_parts = {*accumulate((len(tree) for tree in trees), initial=0)}
    with torch.no_grad():
        before = attention(*inputs)[0]
        for number, (start, end) in enumerate(pairwise(ends)):
            if number in first_parts:  # a trunk, which is read
                continue
            changed = [torch.cat([each[:, :, :start], -each[:, :, start:end], each[:, :, end:]], 2) for each in inputs]
            after = attention(*changed)[0]
            if not (torch.equal(before[:start], after[:start]) and torch.equal(before[end:], after[end:])):
                return True
    return False
