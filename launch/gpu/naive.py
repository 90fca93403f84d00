"""The step by transformers alone: padded rows, all logits, the formulas of the papers. It shares no code with the product."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

BETA, CENTERING = 0.1, 0.01  # the product's defaults, which the runs keep

Row = tuple[Any, Any]  # token ids of a prompt; ids of a completion, and which of them are scored


class Naive:
    """A copy of a model, with transformers' own attention, in `dtype`; `half`: products in bfloat16 under autocast."""

    def __init__(self, model: Any, *, dtype: torch.dtype | None = None, half: bool = False, attention: str = "eager") -> None:
        self.model = deepcopy(model)
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        inner.set_attn_implementation(attention)
        if dtype is not None:
            self.model = self.model.to(dtype)
        self.half, self.device = half, next(self.model.parameters()).device
        self.padding = inner.config.pad_token_id

    def _padded(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, (rows, time)."""
        ids = [torch.tensor([*map(int, prompt), *map(int, completion.ids)]) for prompt, completion in rows]
        lengths = torch.tensor([len(each) for each in ids])
        padded = pad_sequence(ids, batch_first=True, padding_value=self.padding)
        mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
        return padded.to(self.device), mask.to(self.device)

    def _forward(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Token ids (rows, time), and the logits in at least float32."""
        ids, mask = self._padded(rows)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            logits = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        return ids, logits if logits.dtype is torch.float64 else logits.float()

    def logps(self, rows: Sequence[Row]) -> Tensor:
        """The log-probs of each row's scored tokens, summed: (rows,)."""
        ids, logits = self._forward(rows)
        each = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        scored = torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, completion) in enumerate(rows):
            start = len(prompt)
            scored[row, start : start + len(completion.ids)] = torch.tensor(completion.scored, device=self.device)
        return torch.where(scored[:, 1:], each, 0.0).sum(1)

    @torch.no_grad()
    def size(self, rows: Sequence[Row]) -> float:
        """The mean size of what `logps` returns, nats."""
        return self.logps(rows).abs().mean().item()

    def scores(self, rows: Sequence[Row]) -> Tensor:
        """A reward model's score of each row: (rows,)."""
        return self._forward(rows)[1][:, 0]


def sft(policy: Naive, reference: Naive, items: Sequence[Any], partners: Sequence[Any]) -> Tensor:
    rows = [(item.prompt, item.completions[0]) for item in items]
    return -policy.logps(rows).sum() / sum(int(completion.scored.sum()) for _, completion in rows)


def dpo(policy: Naive, reference: Naive, items: Sequence[Any], partners: Sequence[Any]) -> Tensor:
    ratios = [_ratios(policy, reference, [(item.prompt, item.completions[which]) for item in items]) for which in (0, 1)]
    return -logsigmoid(BETA * (ratios[0] - ratios[1])).mean()


def kto(policy: Naive, reference: Naive, items: Sequence[Any], partners: Sequence[Any]) -> Tensor:
    z0 = divergence(policy, reference, items, partners).clamp(min=0)
    gain = BETA * (_ratios(policy, reference, [(item.prompt, item.completions[0]) for item in items]) - z0)
    good = torch.tensor([item.labels["desirable"] > 0 for item in items], device=gain.device)
    return (1 - torch.where(good, gain, -gain).sigmoid()).mean()


@torch.no_grad()
def divergence(policy: Naive, reference: Naive, items: Sequence[Any], partners: Sequence[Any]) -> Tensor:
    """KTO's estimate of the KL: the mean log-ratio of completions that answer other prompts."""
    rows = [(item.prompt, partner.completions[0]) for item, partner in zip(items, partners, strict=True)]
    return _ratios(policy, reference, rows).mean()


def reward(policy: Naive, reference: Naive, items: Sequence[Any], partners: Sequence[Any]) -> Tensor:
    chosen, rejected = (policy.scores([(item.prompt, item.completions[which]) for item in items]) for which in (0, 1))
    return (-logsigmoid(chosen - rejected) + CENTERING * (chosen + rejected) ** 2).mean()


def _ratios(policy: Naive, reference: Naive, rows: Sequence[Row]) -> Tensor:
    with torch.no_grad():
        before = reference.logps(rows)
    return policy.logps(rows) - before


LOSSES: dict[str, Callable[..., Tensor]] = {"sft": sft, "dpo": dpo, "kto": kto, "reward": reward}


def step(loss: str, policy: Naive, reference: Naive, items: Sequence[Any], partners: Sequence[Any]) -> tuple[float, Tensor]:
    """The loss, and the gradient of all trained parameters in the order of their names, float64 on the host."""
    policy.model.train()
    policy.model.zero_grad()
    value = LOSSES[loss](policy, reference, items, partners)
    value.backward()
    return value.item(), gradient_of(policy.model)


def gradient_of(model: Any) -> Tensor:
    trained = sorted((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in trained]
    return torch.cat([part.detach().flatten().double().cpu() for part in parts])
