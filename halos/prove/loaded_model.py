"""Proof of the loaded model: one row through the module to be trained, sharded as it is, against the model's own forward."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from halos.data.collate import pack
from halos.distributed.strategy import Strategy
from halos.examples import Completion
from halos.logps.model import ModelWithHead
from halos.prove.small_copy import FLOOR, Check
from halos.reward_kind import RewardKind
from halos.types import Acted, WholeModelInput

TOKENS = 64
TEXT = "Before the first step, one row of text goes through the model as it will be trained, and through the model by itself. "
HALF = 2.0**-6  # fraction of the largest logit: four roundings of bfloat16, since two right kernels may differ by two and more


@torch.no_grad()
def prove(
    module: nn.Module, strategy: Strategy, tokenizer: PreTrainedTokenizerBase, *, temperature: float, longest: int
) -> list[Check]:
    """Every rank calls, and gets its own checks."""
    accelerator, wrapper = strategy.accelerator, next(part for part in module.modules() if isinstance(part, ModelWithHead))
    ids = _ids(tokenizer, min(TOKENS, longest))
    training, half = module.training, accelerator.mixed_precision == "bf16"
    module.eval()
    with accelerator.autocast():
        row = (ids[:1].numpy(), Completion(ids[1:].numpy(), ids[1:].numpy() >= 0))
        output = _values(module(pack([row]).to(accelerator.device)))
        with wrapper.plainly():
            own = module(WholeModelInput(ids.to(accelerator.device)))
    strategy.reshard(module)
    module.train(training)
    half = half or next(wrapper.parameters()).dtype is not torch.float32
    expected = _expected(own, ids, temperature, wrapper.reward)
    allowed = (HALF if half else FLOOR) * max(1.0, own.abs().max().item())
    output, expected = output.double().cpu(), expected.double().cpu()
    return [Check("one row, as it is trained", _distance(output, expected), allowed),
            Check("the same row, on the first process", _distance(output, _from_rank_0(expected)), allowed)]  # fmt: skip


def _distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().nan_to_num(float("inf")).item()


def _from_rank_0(value: Tensor) -> Tensor:
    """Rank 0's value, which every rank must reproduce: only rank 0 is sure to have read the weights from disk."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def _ids(tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    ids: Any = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return torch.tensor((list(ids) * length)[:length], dtype=torch.long)


def _values(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return (output.logps if isinstance(output, Acted) else output).values[0]


def _expected(own: Tensor, ids: Tensor, temperature: float, reward: RewardKind | None) -> Tensor:
    """What the module gives for a row whose tokens are all scored, from the model's own output."""
    if reward is None:
        return _logps(own, ids, temperature)
    return own.double()[0, :1] if reward is RewardKind.OUTCOME else own.double()[1:]


def _logps(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    each = (logits.double().cpu() / temperature)[:-1].log_softmax(-1)
    return each.gather(-1, ids[1:, None])[:, 0]
