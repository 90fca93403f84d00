"""The outputs of a trained model on fixed tokens: the one check of a merge that reads nothing from the disk."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halos.distributed.parameters import is_shard, local_part
from halos.logps.head import LOGITS_AT_ONCE
from halos.logps.hidden import accepted
from halos.logps.model import bare
from halos.logps.modes import adapter_off
from halos.logps.vocabulary import Vocabulary
from halos.merge.lora import scales_of
from halos.merge.routing import Routes, recorded, replayed, rerouted_fraction
from halos.merge.safetensors_io import BLOCK
from halos.reward_kind import RewardKind
from halos.types import Acted, Sequences, TokenLogps

ROWS, LENGTH = 12, 32
REWARD_ROWS = 64  # for a reward model, whose rows have only one score each
DRAWS, SCORE_DRAWS = 2, 8  # of noise: scores of all rows move together, so that from draw to draw it differs by a factor of 3


@dataclass(frozen=True, slots=True)
class ProbeOutputs:
    """A model's forward pass on the probe, in whatever arithmetic and sharded however it was."""

    ids: Tensor  # (rows, length)
    values: (
        Tensor  # float32: log-probs (or logits of a step) of each row's tokens but the first, end to end; or a score for each row
    )
    scales: Mapping[str, float]  # the factor of each layer's update
    unit: float  # the rounding unit of its arithmetic
    bit_sums: frozenset[int] | None = None  # of the trained tensors
    temperature: float = 1.0
    without_adapter: Tensor | None = (
        None  # `values` with the adapter off, of a quantised model, whose base differs from the disk's
    )
    routes: Routes = ()  # of the tokens of a mixture


def probe_ids(vocabulary: Vocabulary, known: int, *, longest: int | None = None, reward: RewardKind | None = None) -> Tensor:
    """Return fixed token ids (rows, length): the first row has the newest ids, the others are drawn from all."""
    size = max(vocabulary.size, known)
    rows, length = REWARD_ROWS if reward is RewardKind.OUTCOME else ROWS, min(LENGTH, longest or LENGTH)
    ids = torch.randint(0, size, (rows, length), generator=torch.Generator().manual_seed(0))
    latest = vocabulary.size or size
    special = torch.tensor([*vocabulary.new, *range(max(0, latest - length), latest)][:length])
    ids[0, : len(special)] = special
    return ids


@torch.no_grad()
def probe_trained(
    module: nn.Module, model: PeftModel, ids: Tensor, *, autocast: Callable[[], AbstractContextManager[Any]], half: bool,
    temperature: float,
) -> ProbeOutputs:  # fmt: skip
    """Run the trained module, wrapped by DDP, FSDP or ZeRO, on `ids`. Every rank calls, with the same ids.

    `half`: `autocast` computes in bfloat16.
    """
    training, inner = module.training, bare(model)
    module.eval()
    try:
        with autocast():
            with recorded(inner) as routes:
                values = _values(module, ids, inner.device)
            without_adapter = None
            if getattr(inner, "is_quantized", False):
                with adapter_off(model), replayed(inner, routes):
                    without_adapter = _values(module, ids, inner.device)
    finally:
        module.train(training)
    return ProbeOutputs(
        ids, values, scales_of(model), rounding_unit(inner, half=half), bit_sums_of(model), temperature, without_adapter, routes
    )


def bit_sums_of(model: nn.Module) -> frozenset[int]:
    """Return the bit sum of each trained tensor, however it is sharded. Every rank calls."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return frozenset()
    local = [local_part(parameter) if is_shard(parameter) else parameter for parameter in parameters]
    sums = torch.tensor([bit_sum(part) for part in local], dtype=torch.int64, device=local[0].device)
    sharded = torch.tensor([is_shard(parameter) for parameter in parameters], device=sums.device)
    if sharded.any():
        totals = sums.clone()
        dist.all_reduce(totals)
        sums = torch.where(sharded, totals, sums)
    return frozenset(sums.tolist())


def bit_sum(values: Tensor) -> int:
    """Return the sum of a tensor's values as integers, modulo 2^64: the same however the tensor is sharded."""
    integers = {4: torch.int32, 2: torch.int16, 8: torch.int64}[values.element_size()]
    return int(values.detach().contiguous().view(integers).sum(dtype=torch.int64).item())


def rounding_unit(model: nn.Module, *, half: bool) -> float:
    """Return the rounding unit of the coarsest arithmetic in a forward pass of `model`."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    kinds |= {torch.bfloat16} if half else set()
    units = [torch.finfo(kind).eps for kind in kinds & {torch.float32, torch.bfloat16, torch.float16}]
    if torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest":
        units.append(2.0**-10)  # TF32
    return max(units, default=torch.finfo(torch.float32).eps)


def _values(module: nn.Module, ids: Tensor, device: torch.device) -> Tensor:
    return _flat(module(_packed(ids).to(device)))


def _packed(ids: Tensor) -> Sequences:
    """Pack rows of one length end to end; every token but a row's first is scored."""
    rows, length = ids.shape
    row, column = (each.flatten() for each in torch.meshgrid(torch.arange(rows), torch.arange(length - 1), indexing="ij"))
    positions, trees, leaves = torch.arange(length).repeat(rows), ((length,),) * rows, tuple(range(rows))
    sources = row * length + column
    return Sequences(ids.flatten(), positions, trees, leaves, ids[:, 1:].flatten(), sources, row, column, length - 1)


def _flat(output: Any) -> Tensor:
    if isinstance(output, Acted):
        output = output.logps
    values = output.values if isinstance(output, TokenLogps) else output
    assert isinstance(values, Tensor)
    return values.float().flatten().cpu()


@torch.no_grad()
def outputs_of(model: Any, ids: Tensor, *, temperature: float, reward: RewardKind | None, routes: Routes = ()) -> Tensor:
    """Return `ProbeOutputs.values` of a model that from_pretrained loaded, along `routes` if there are any."""
    parts = []
    options = accepted(type(bare(model)), use_cache=False)  # some caches fail for models of an unusual depth
    with replayed(model, routes):
        for rows in ids.split(_rows_at_once(model, ids, reward=reward)):
            logits = model(input_ids=rows.to(model.device), **options).logits.float()
            if reward is RewardKind.PROCESS:
                logits = logits[:, 1:]  # of the tokens that are scored
            elif reward is None:
                logits = (logits[:, :-1] / temperature).log_softmax(-1).gather(-1, rows[:, 1:, None].to(logits.device))
            parts.append(logits.flatten().cpu())
    return torch.cat(parts)


def _rows_at_once(model: Any, ids: Tensor, *, reward: RewardKind | None) -> int:
    """Rows of one length need no padding, but a reward model without a padding token takes no batch at all."""
    config = bare(model).config.get_text_config()
    if reward is RewardKind.OUTCOME and config.pad_token_id is None:
        return 1
    return len(ids) if reward else max(1, LOGITS_AT_ONCE // (ids.shape[1] * config.vocab_size))


def outputs_and_routes(model: Any, ids: Tensor, **settings: Any) -> tuple[Tensor, Routes]:
    """Return `outputs_of`, and what a mixture's routers chose, whichever routes its tokens were made to take."""
    with recorded(model) as chosen:
        values = outputs_of(model, ids, **settings)
    return values, chosen


# --- how far two right computations may differ ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Noise:
    """The effect of one rounding at each module."""

    moved: Tensor  # (number,) of values, of all draws
    rerouted: float  # the fraction of a mixture's routing decisions that change


def noise(
    model: nn.Module, exact: ProbeOutputs, unit: float, *, temperature: float, reward: RewardKind | None, routes: Routes = ()
) -> Noise:
    """Measure how far the values move from the model's `exact` ones if every module's output is off by one rounding of the terms
    it sums.

    This propagates a rounding at each weight and product to the end, for any depth and architecture. A mixture's tokens take
    `routes` all the same. Each draw is of all rows; of scores each is of other rows, unless they are routed.
    """
    settings: dict[str, Any] = {"temperature": temperature, "reward": reward, "routes": routes}
    moved, rerouted, draws = [], [], SCORE_DRAWS if reward is RewardKind.OUTCOME else DRAWS
    parts = [(exact.ids, exact.values)] * draws
    if reward is RewardKind.OUTCOME and not routes:
        parts = list(zip(exact.ids.chunk(draws), exact.values.chunk(draws), strict=True))
    for seed, (ids, before) in enumerate(parts):
        generator = torch.Generator().manual_seed(seed)
        handles = [each.register_forward_hook(_rounding_hook(unit, generator)) for each in model.modules() if each is not model]
        try:
            values, others = outputs_and_routes(model, ids, **settings)
            moved.append(values - before)
            rerouted.append(rerouted_fraction(others, exact.routes))
        finally:
            for handle in handles:
                handle.remove()
    return Noise(torch.cat(moved), sum(rerouted) / draws)


def rerouted_in_half(model: Any, ids: Tensor, **settings: Any) -> float:
    """Return the fraction of a mixture's decisions that change if products are computed in bfloat16: scores of experts that are
    close then become equal, which noise on the outputs of modules does not reproduce."""
    _, chosen = outputs_and_routes(model, ids, **settings)
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        _, others = outputs_and_routes(model, ids, **settings)
    return rerouted_fraction(others, chosen)


def _rounding_hook(unit: float, generator: torch.Generator) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) and output else output
        if not (isinstance(first, Tensor) and first.is_floating_point()):
            return None
        size = _term_size(module, inputs, first)
        drawn = (torch.rand(first.shape, generator=generator) - 0.5).to(first.device)
        off = (first + drawn * unit * size).to(first.dtype)
        return (off, *output[1:]) if isinstance(output, tuple) else off

    return hook


def _term_size(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Return the size of what is rounded for an output: of a product the terms of its sum, which may be larger than the sum."""
    whole = output.float().square().mean(-1, keepdim=True).sqrt()
    if not isinstance(module, nn.Linear | Conv1D):
        return whole
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    squares = inputs[0].float().square()
    parts = weight.split(max(1, BLOCK // weight.shape[1]))
    terms = torch.cat([nn.functional.linear(squares, part.float().square()) for part in parts], -1).sqrt()
    return terms if terms.shape == output.shape else whole  # not so for a grouped product


def rms(values: Sequence[float] | Tensor) -> float:
    """Return the root mean square: nan if one value is."""
    return torch.as_tensor(values, dtype=torch.float64).square().mean().sqrt().item()
