"""One row through the module that will be trained, as it is spread over the processes, against the model's own forward of it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from halos.data.collate import pack
from halos.data.dataset import Completion
from halos.distributed.strategy import Strategy
from halos.logps.model import Reader
from halos.prove.trial import FLOOR, Check
from halos.types import Acted, Whole

TOKENS = 64
TEXT = "Before the first step, one row of text goes through the model as it will be trained, and through the model by itself. "
HALF = 2.0**-7  # of the largest logit: what bfloat16 rounds to, twice


@torch.no_grad()
def prove(
    module: nn.Module, strategy: Strategy, tokenizer: PreTrainedTokenizerBase, *, temperature: float, longest: int
) -> list[Check]:
    """Every process calls, and gets its own numbers."""
    accelerator, reader = strategy.accelerator, next(part for part in module.modules() if isinstance(part, Reader))
    ids = _ids(tokenizer, min(TOKENS, longest))
    training, half = module.training, accelerator.mixed_precision == "bf16"
    module.eval()
    with accelerator.autocast():
        row = (ids[:1].numpy(), Completion(ids[1:].numpy(), ids[1:].numpy() >= 0))
        found = _numbers(module(pack([row]).to(accelerator.device)))
        with reader.plainly():
            said = module(Whole(ids.to(accelerator.device)))
    strategy.reshard(module)
    module.train(training)
    half = half or next(reader.parameters()).dtype is not torch.float32
    truth = said.double()[0, :1] if reader.reward else _logps(said, ids, temperature)
    allowed = (HALF if half else FLOOR) * max(1.0, said.abs().max().item())
    mine, plain = found.double().cpu(), truth.double().cpu()
    return [Check("one row, as it is trained", _distance(mine, plain), allowed),
            Check("the same row, on the first process", _distance(mine, _of_the_first(plain)), allowed)]  # fmt: skip


def _distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().nan_to_num(float("inf")).item()


def _of_the_first(value: Tensor) -> Tensor:
    """What every process would have if its part of the model were that of the first, which has read the weights."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def _ids(tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    ids: Any = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return torch.tensor((list(ids) * length)[:length], dtype=torch.long)


def _numbers(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return (output.logps if isinstance(output, Acted) else output).values[0]


def _logps(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    each = (logits.double().cpu() / temperature)[:-1].log_softmax(-1)
    return each.gather(-1, ids[1:, None])[:, 0]
