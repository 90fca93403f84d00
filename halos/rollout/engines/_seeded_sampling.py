"""Sampling by a random number of each request's own, inside transformers' continuous batching."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from halos.rollout.types import Request


class SeededSampling(ContinuousBatchingLogitsProcessor):
    """Chooses each token by the request's own random number, so that neighbours in a batch and their order do not matter.

    Continuous batching draws for a whole batch from one generator. Here the cumulative distribution is inverted at the number
    that belongs to (request, position), all other tokens are made impossible, and the engine takes the likeliest.
    """

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012  transformers' own interface
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, requests: dict[str, Request], *, top_p: float, top_k: int) -> None:
        self.requests = requests
        self.uniforms = {name: request.uniforms() for name, request in requests.items()}
        self.logps: dict[str, list[float]] = {name: [] for name in requests}
        self.top_p = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.top_k = TopKLogitsWarper(top_k) if top_k else None
        self._rows: list[str] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """The random number of each row of the coming step, as float32 in int32's clothes."""
        states = [each.state for each in requests_with_new_token]
        self._rows = [state.request_id for state in states]
        numbers = []
        for state in states:
            done = len(state.initial_tokens) + len(state.generated_tokens) - len(self.requests[state.request_id].ids)
            numbers.append(float(self.uniforms[state.request_id][done]))
        return torch.tensor(numbers, dtype=torch.float32).view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """(rows, vocabulary) logits -> 0 for the token that is sampled, -inf for all others."""
        rows = [self.requests[name] for name in self._rows]
        whole = scores  # the rows of prompts that are not read to their end come last, and nobody looks at theirs
        scores = scores[: len(rows)]
        if not rows:
            return whole
        temperatures = torch.tensor([request.temperature or 1.0 for request in rows], device=scores.device)
        greedy = torch.tensor([request.temperature == 0 for request in rows], device=scores.device)
        scores = scores.float() / temperatures[:, None]
        allowed = scores
        if self.top_k is not None:
            allowed = self.top_k(None, allowed)  # type: ignore[arg-type]
        if self.top_p is not None:
            allowed = self.top_p(None, allowed)  # type: ignore[arg-type]
        rising = allowed.double().softmax(-1).cumsum(-1)
        at = tensor_arg[: len(rows)].view(torch.float32).double()[:, None] * rising[:, -1:]
        drawn = (rising < at).sum(-1).clamp(max=scores.shape[-1] - 1)
        chosen = torch.where(greedy, scores.argmax(-1), drawn)[:, None]
        logps = (scores.gather(1, chosen)[:, 0] - scores.logsumexp(-1)).tolist()
        for name, logp in zip(self._rows, logps, strict=True):
            self.logps[name].append(logp)
        return torch.full_like(whole, float("-inf")).index_put_((torch.arange(len(rows), device=whole.device), chosen[:, 0]),
                                                                scores.new_zeros(()))  # fmt: skip
