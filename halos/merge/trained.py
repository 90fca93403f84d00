"""What a trained model says of itself on fixed tokens: the one witness of a merge that reads nothing from the disk."""

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
from halos.logps.model import adapter_off, bare
from halos.logps.vocabulary import Vocabulary
from halos.merge.lora import scales_of
from halos.merge.routing import Routes, otherwise, recorded, replayed
from halos.merge.safetensors_io import BLOCK
from halos.types import Acted, Sequences, TokenLogps

ROWS, LENGTH = 12, 32
FOR_SCORES = 64  # rows of a reward model, since each has but one score


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model's own forward pass, whatever its arithmetic and however it is spread over processes."""

    ids: Tensor  # (rows, length)
    values: Tensor  # float32: log-probs of each row's tokens but the first, end to end; or a score for each row
    scales: Mapping[str, float]  # what each layer multiplies its update by
    unit: float  # the rounding unit of its arithmetic
    content: frozenset[int] | None = None  # sums over the bits of the tensors that were trained
    temperature: float = 1.0
    without: Tensor | None = None  # of a quantised model, whose base is not the one on the disk: `values`, its adapter off
    routes: Routes = ()  # that its routers chose for a mixture's tokens


def probe(vocabulary: Vocabulary, known: int, *, longest: int | None = None, reward: bool = False) -> Tensor:
    """Fixed token ids (rows, length) below `known`; the first row has the newest tokens, the others are spread over all."""
    size = max(vocabulary.size, known)
    rows, length = FOR_SCORES if reward else ROWS, min(LENGTH, longest or LENGTH)
    ids = torch.randint(0, size, (rows, length), generator=torch.Generator().manual_seed(0))
    latest = vocabulary.size or size
    special = torch.tensor([*vocabulary.new, *range(max(0, latest - length), latest)][:length])
    ids[0, : len(special)] = special
    return ids


@torch.no_grad()
def ask(
    module: nn.Module, model: PeftModel, ids: Tensor, *, autocast: Callable[[], AbstractContextManager[Any]], half: bool,
    temperature: float,
) -> Trained:  # fmt: skip
    """Let the module that was trained, as DDP, FSDP or ZeRO have it, read `ids`. Every process calls, with the same ids.

    `half` says that `autocast` computes in bfloat16.
    """
    training, inner = module.training, bare(model)
    module.eval()
    try:
        with autocast():
            with recorded(inner) as routes:
                values = _values(module, ids, inner.device)
            without = None
            if getattr(inner, "is_quantized", False):
                with adapter_off(model), replayed(inner, routes):
                    without = _values(module, ids, inner.device)
    finally:
        module.train(training)
    return Trained(ids, values, scales_of(model), unit_of(inner, half=half), content_of(model), temperature, without, routes)


def content_of(model: nn.Module) -> frozenset[int]:
    """A sum over the bits of each trained tensor, whichever processes hold its parts. Every process calls."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        return frozenset()
    parts = [local_part(parameter) if is_shard(parameter) else parameter for parameter in trained]
    sums = torch.tensor([bits(part) for part in parts], dtype=torch.int64, device=parts[0].device)
    shared = torch.tensor([is_shard(parameter) for parameter in trained], device=sums.device)
    if shared.any():
        whole = sums.clone()
        dist.all_reduce(whole)
        sums = torch.where(shared, whole, sums)
    return frozenset(sums.tolist())


def bits(values: Tensor) -> int:
    """The sum of a tensor's words, modulo 2^64: equal for equal values, however they are cut."""
    words = {4: torch.int32, 2: torch.int16, 8: torch.int64}[values.element_size()]
    return int(values.detach().contiguous().view(words).sum(dtype=torch.int64).item())


def unit_of(model: nn.Module, *, half: bool) -> float:
    """The rounding unit of the coarsest arithmetic that a forward pass of `model` has in it."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    kinds |= {torch.bfloat16} if half else set()
    units = [torch.finfo(kind).eps for kind in kinds & {torch.float32, torch.bfloat16, torch.float16}]
    if torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest":
        units.append(2.0**-10)  # TF32
    return max(units, default=torch.finfo(torch.float32).eps)


def _values(module: nn.Module, ids: Tensor, device: torch.device) -> Tensor:
    return _flat(module(_packed(ids).to(device)))


def _packed(ids: Tensor) -> Sequences:
    """Rows of one length as sequences packed end to end; every token but a row's first is scored."""
    rows, length = ids.shape
    row, column = (each.flatten() for each in torch.meshgrid(torch.arange(rows), torch.arange(length - 1), indexing="ij"))
    positions, lengths = torch.arange(length).repeat(rows), (length,) * rows
    return Sequences(ids.flatten(), positions, lengths, ids[:, 1:].flatten(), row * length + column, row, column, length - 1)


def _flat(output: Any) -> Tensor:
    if isinstance(output, Acted):
        output = output.logps
    values = output.values if isinstance(output, TokenLogps) else output
    assert isinstance(values, Tensor)
    return values.float().flatten().cpu()


@torch.no_grad()
def said_by(model: Any, ids: Tensor, *, temperature: float, reward: bool, routes: Routes = ()) -> Tensor:
    """What `Trained.values` holds, by the plain forward pass of a model that from_pretrained gave, along `routes` where there
    are any."""
    parts = []
    plain = accepted(type(bare(model)), use_cache=False)  # some caches know only models of their usual depth
    with replayed(model, routes):
        for rows in ids.split(_rows_at_once(model, ids, reward=reward)):
            logits = model(input_ids=rows.to(model.device), **plain).logits.float()
            if not reward:
                logits = (logits[:, :-1] / temperature).log_softmax(-1).gather(-1, rows[:, 1:, None].to(logits.device))
            parts.append(logits.flatten().cpu())
    return torch.cat(parts)


def _rows_at_once(model: Any, ids: Tensor, *, reward: bool) -> int:
    """Rows of one length need no padding, but a reward model that has no padding token takes no batch at all."""
    config = bare(model).config.get_text_config()
    if reward and config.pad_token_id is None:
        return 1
    return len(ids) if reward else max(1, LOGITS_AT_ONCE // (ids.shape[1] * config.vocab_size))


def chosen_by(model: Any, ids: Tensor, **knobs: Any) -> tuple[Tensor, Routes]:
    """The same, and what a mixture's routers chose on the way, whichever routes its tokens took."""
    with recorded(model) as chosen:
        values = said_by(model, ids, **knobs)
    return values, chosen


# --- how far two right computations may lie apart --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Noise:
    """What one rounding at each module moves."""

    moved: Tensor  # (draws, values)
    detours: float  # the share of a mixture's decisions that are others


def noise(
    model: nn.Module, ids: Tensor, unit: float, *, temperature: float, reward: bool, routes: Routes = (), draws: int = 2
) -> Noise:
    """How far the values move where every module's output is off by one rounding of what it was summed from.

    So a rounding at each weight and at each product shows in what it comes to at the end, for any depth and architecture. A
    mixture's tokens take `routes` nevertheless.
    """
    knobs: dict[str, Any] = {"temperature": temperature, "reward": reward, "routes": routes}
    plain, chosen = chosen_by(model, ids, **knobs)
    moved, detours = [], []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        handles = [each.register_forward_hook(_off_by(unit, generator)) for each in model.modules() if each is not model]
        try:
            values, others = chosen_by(model, ids, **knobs)
            moved.append(values - plain)
            detours.append(otherwise(others, chosen))
        finally:
            for handle in handles:
                handle.remove()
    return Noise(torch.stack(moved), sum(detours) / draws)


def detours_in_half(model: Any, ids: Tensor, **knobs: Any) -> float:
    """The share of a mixture's decisions that are others where products are computed in bfloat16: scores of experts that lie
    close together are then equal, and no output of a module shows it."""
    _, chosen = chosen_by(model, ids, **knobs)
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        _, others = chosen_by(model, ids, **knobs)
    return otherwise(others, chosen)


def _off_by(unit: float, generator: torch.Generator) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) and output else output
        if not (isinstance(first, Tensor) and first.is_floating_point()):
            return None
        size = _size(module, inputs, first)
        drawn = (torch.rand(first.shape, generator=generator) - 0.5).to(first.device)
        off = (first + drawn * unit * size).to(first.dtype)
        return (off, *output[1:]) if isinstance(output, tuple) else off

    return hook


def _size(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """What is rounded on the way to an output: of a product the terms of its sum, which may be much larger than the sum."""
    whole = output.float().square().mean(-1, keepdim=True).sqrt()
    if not isinstance(module, nn.Linear | Conv1D):
        return whole
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    squares = inputs[0].float().square()
    parts = weight.split(max(1, BLOCK // weight.shape[1]))
    terms = torch.cat([nn.functional.linear(squares, part.float().square()) for part in parts], -1).sqrt()
    return terms if terms.shape == output.shape else whole  # a product of groups is another


def typical(values: Sequence[float] | Tensor) -> float:
    """Root of the mean square, which is nan where one is."""
    return torch.as_tensor(values, dtype=torch.float64).square().mean().sqrt().item()
