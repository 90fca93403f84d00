"""Sampling with a separate random stream for each request, inside transformers' continuous batching."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from halos.rollout.types import Request


class SeededSampling(ContinuousBatchingLogitsProcessor):
    """Samples each token with the request's own random number, so that the rest of the batch and its order do not matter.

    Continuous batching draws for a whole batch from one generator. Here the inverse of the cumulative distribution is taken at
    the number of (request, position), all other tokens are set to -inf, and the engine decodes greedily.
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
        """The random numbers of the next step's rows, as float32 bits in the int32 tensor that transformers passes on."""
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
        whole = scores  # rows of partially prefilled prompts come last; their logits are not used
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
        cumulative = allowed.double().softmax(-1).cumsum(-1)
        threshold = tensor_arg[: len(rows)].view(torch.float32).double()[:, None] * cumulative[:, -1:]
        drawn = (cumulative < threshold).sum(-1).clamp(max=scores.shape[-1] - 1)
        chosen = torch.where(greedy, scores.argmax(-1), drawn)[:, None]
        logps = (scores.gather(1, chosen)[:, 0] - scores.logsumexp(-1)).tolist()
        for name, logp in zip(self._rows, logps, strict=True):
            self.logps[name].append(logp)
        return torch.full_like(whole, float("-inf")).index_put_((torch.arange(len(rows), device=whole.device), chosen[:, 0]),
                                                                scores.new_zeros(()))  # fmt: skip
