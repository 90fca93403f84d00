"""The kernels that the hot path chooses on this device: right against float64, and without a cost for new shapes."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gpu.place import Place, Result
from halos.distributed.device import prepare_torch
from halos.logps import linear_head
from halos.logps.attention import attend_by_tree
from halos.logps.distribution import Reading
from halos.logps.head import logits_at_once

TREES = ((40, 30, 50), (120,), (64, 10, 70, 12))  # a trunk and its branches
HEADS, KV_HEADS, SIZE = 4, 2, 64
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # relative, of outputs and gradients
NEW_SHAPE = 20.0  # ms

Attention = Callable[..., tuple[Tensor, None]]


def check(name: str, place: Place) -> Result:
    prepare_torch()
    found: dict[str, float] = {}
    dtypes = [torch.float32, *([torch.bfloat16] if place.card["bfloat16"] else [])]
    for dtype in dtypes:
        short = str(dtype).removeprefix("torch.")
        found[f"attention {short}"] = attention_error(place.device, dtype) / BOUNDS[dtype]
        for trained in (False, True):
            found[f"{'trained' if trained else 'frozen'} head {short}"] = head_error(place.device, dtype, trained) / BOUNDS[dtype]
    times = _times(place)
    right, fast = max(found.values()) <= 1, times["new shape ms"] <= NEW_SHAPE or not place.cuda
    figure = f"errors at most {max(found.values()):.2f} of their bounds; " + ", ".join(f"{k} {v:.3g}" for k, v in times.items())
    return Result.of(right and fast, figure, errors_over_bounds=found, times=times)


# --- right -------------------------------------------------------------------------------------------------------------


def attention_error(device: str, dtype: torch.dtype, attention: Attention | None = None) -> float:
    """The largest relative error of the output and of the gradients of q, k and v; of `attend_by_tree` unless `attention`."""
    made, weight = tensors(TREES, device, dtype), None
    module, results = nn.Module(), []
    for exact in (False, True):
        inputs = [each.detach().double() if exact else each.detach() for each in made]
        inputs = [each.requires_grad_() for each in inputs]
        output = _by_hand(*inputs) if exact else (attention or attend_by_tree)(module, *inputs, None, trees=TREES)[0]
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(device) if weight is None else weight
        (output.double() * weight).sum().backward()
        results.append([output, *(each.grad for each in inputs)])
    return max(_relative(ours, exact) for ours, exact in zip(*results, strict=True))


def tensors(
    trees: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype, heads: int = HEADS, kv: int = KV_HEADS, *, size: int = SIZE
) -> list[Tensor]:
    """Query, key and value, (1, heads, tokens, size), with the strides of a model's projections."""
    generator, total = torch.Generator().manual_seed(0), sum(map(sum, trees))
    return [torch.randn(1, total, n, size, generator=generator).to(device, dtype).transpose(1, 2) for n in (heads, kv, kv)]


def _by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention with a mask over all tokens, in the inputs' dtype: (1, tokens, heads, size)."""
    visible, first = torch.zeros(query.shape[2], query.shape[2], dtype=torch.bool), 0
    for tree in TREES:
        start = first
        for part in tree:
            own, trunk = slice(start, start + part), slice(first, first + tree[0])
            visible[own, trunk] = True
            visible[own, own] = torch.ones(part, part).tril().bool()
            start += part
        first = start
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * SIZE**-0.5
    weights = logits.masked_fill(~visible.to(query.device), float("-inf")).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def head_error(device: str, dtype: torch.dtype, trained: bool) -> float:
    """The largest relative error of log-probs, in chunks, and of the gradients; of a trained head with entropies."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 1000, bias=False).to(device, dtype).requires_grad_(trained)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(1000, 64, generator=generator) / 8)
    hidden = torch.randn(50, 64, generator=generator).to(device, dtype).requires_grad_()
    targets, softmax = torch.arange(50, device=device) * 7, linear_head.Softmax(1.0, None, 1.0, 16)
    reading = Reading(targets, entropy=trained)
    weight = torch.randn(50, reading.width, generator=generator).to(device)
    ours = linear_head.read(layer, hidden, reading, softmax)
    (ours * weight).sum().backward()
    exact_hidden, exact_weight = (each.detach().double().requires_grad_() for each in (hidden, layer.weight))
    every = (exact_hidden @ exact_weight.T).log_softmax(-1)
    exact = torch.cat(
        [every.gather(-1, targets[:, None]), *([-(every.exp() * every).sum(-1, keepdim=True)] if trained else [])], -1
    )
    (exact * weight).sum().backward()
    errors = [_relative(ours, exact), _relative(hidden.grad, exact_hidden.grad)]
    return max([*errors, _relative(layer.weight.grad, exact_weight.grad)] if trained else errors)


def _relative(one: Tensor | None, exact: Tensor | None) -> float:
    assert one is not None
    assert exact is not None
    return ((one.double() - exact).norm() / exact.norm()).item()


# --- fast --------------------------------------------------------------------------------------------------------------


def milliseconds(place: Place, run: Callable[[], object]) -> float:
    if place.cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if place.cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def _times(place: Place) -> dict[str, float]:
    """What a shape that was never seen costs attention, and milliseconds of attention, head and optimizer at the size of a
    model of 1.5 B parameters; smaller on a CPU."""
    dtype = torch.bfloat16 if place.cuda and place.card["bfloat16"] else torch.float32
    heads, kv, long = (12, 2, 500) if place.cuda else (4, 2, 50)
    module = nn.Module()

    def attend(trees: tuple[tuple[int, ...], ...]) -> Callable[[], object]:
        inputs = [each.requires_grad_() for each in tensors(trees, place.device, dtype, heads, kv)]
        return lambda: attend_by_tree(module, *inputs, None, trees=trees)[0].sum().backward()

    known = attend(((long,),) * 8)
    repeated = [milliseconds(place, known) for _ in range(6)][1:]
    # of one size, so that nothing but the shape is new
    new = [milliseconds(place, attend(((long + n,), (long - n,), *((long,),) * 6))) for n in range(1, 6)]
    usual = statistics.median(repeated)
    return {"new shape ms": max(0.0, statistics.median(new) - usual), "attention ms": usual, **_head_and_optimizer(place, dtype)}


def _head_and_optimizer(place: Place, dtype: torch.dtype) -> dict[str, float]:
    vocabulary, width, scored, elements = (151936, 1536, 2400, 50_000_000) if place.cuda else (1000, 64, 50, 10_000)
    layer = nn.Linear(width, vocabulary, bias=False, device=place.device)
    hidden = torch.randn(scored, width, device=place.device, dtype=dtype, requires_grad=True)
    rows, targets = logits_at_once(hidden.device) // vocabulary, torch.randint(0, vocabulary, (scored,), device=place.device)
    softmax = linear_head.Softmax(1.0, None, 1.0, rows)

    def head() -> None:
        with torch.autocast(place.device, torch.bfloat16, enabled=dtype is torch.bfloat16):
            linear_head.read(layer, hidden, Reading(targets), softmax).sum().backward()

    parameters = [nn.Parameter(torch.randn(elements // 50, device=place.device)) for _ in range(50)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    step = torch.optim.AdamW(parameters, lr=1e-9, fused=True).step
    timed = {"head ms": head, "AdamW ms": step}
    return {name: statistics.median([milliseconds(place, run) for _ in range(5)][1:]) for name, run in timed.items()}
