"""The default engine: transformers' continuous batching, with a cache of a given size and a seed for each request."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.logits_process import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from halos.config.schema import Sampler
from halos.rollout.types import Origin, Request, Sample

log = logging.getLogger(__name__)

PAGE = 32  # tokens of one sequence that the cache holds together
MOST_AT_ONCE = 4096  # tokens of one forward pass, prompts included


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


class HFEngine:
    """A model in this process. It must be whole: what FSDP has cut is gathered first."""

    is_paid = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Sampler, origin: Origin) -> None:
        self.model, self.tokenizer, self.settings, self.origin = model, tokenizer, settings, origin
        stops = model.generation_config.eos_token_id if model.generation_config else None
        stops = [stops] if isinstance(stops, int) else list(stops or [])
        self.stops = sorted({*stops, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])})

    def sample(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """All requests are queued before the first step, so that the same list makes the same batches, to the bit."""
        by_name = {str(number): request for number, request in enumerate(requests)}
        processor = SeededSampling(by_name, top_p=self.settings.top_p, top_k=self.settings.top_k)
        training, used = self.model.training, str(self.model.config._attn_implementation)
        self.model.set_attn_implementation("sdpa" if self.model._supports_sdpa else "eager")
        model: Any = self.model
        manager = model.init_continuous_batching(self._generation(), self._batching(requests))
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([processor]))
        manager.logit_processor.tensors_required = 1
        for name, request in by_name.items():
            manager.add_request(list(request.ids), request_id=name, max_new_tokens=request.max_new_tokens)
        manager.start()
        try:
            left = set(by_name)
            while left:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    left.discard(result.request_id)
                    if result.error is not None:
                        raise RuntimeError(f"sampling failed: {result.error}")
                    logps = processor.logps[result.request_id]
                    yield self._sample(by_name[result.request_id], result.generated_tokens, logps)
                elif result is None and not manager.is_running():
                    raise RuntimeError("sampling ended before all requests were answered")
        finally:
            manager.stop(block=True, hard_stop=bool(left))
            manager.destroy()
            self.model.set_attn_implementation(used)
            self.model.train(training)

    def _sample(self, request: Request, ids: Sequence[int], logps: Sequence[float]) -> Sample:
        stopped = bool(ids) and ids[-1] in self.stops
        text = self.tokenizer.decode(list(ids[:-1] if stopped else ids), skip_special_tokens=True)
        assert isinstance(text, str)
        finish = "stop" if stopped else "length"
        return Sample.of(request, self.origin, text, finish=finish, tokens=len(ids), ids=ids, logps=logps)

    def _generation(self) -> GenerationConfig:
        return GenerationConfig(do_sample=False, eos_token_id=self.stops, pad_token_id=self.tokenizer.pad_token_id)

    def _batching(self, requests: Sequence[Request]) -> ContinuousBatchingConfig:
        longest = max(len(request.ids) + request.max_new_tokens for request in requests)
        # room for one sequence at the least, else nothing could ever be scheduled
        pages = max(self.settings.cache_tokens // PAGE, -(-longest // PAGE) + 2)
        tokens = min(MOST_AT_ONCE, max(self.settings.batch_size, max(len(request.ids) for request in requests)) * 2)
        known = inspect.signature(ContinuousBatchingConfig).parameters  # transformers 5.17 calls a page a block
        more: dict[str, Any] = {"page_size" if "page_size" in known else "block_size": PAGE}
        if "auto_switch_to_flash" in known:
            more["auto_switch_to_flash"] = False  # it would fetch a kernel from the hub, and sample by another attention
        return ContinuousBatchingConfig(
            num_blocks=pages, max_batch_tokens=tokens, max_requests_per_batch=self.settings.batch_size, use_async_batching=False,
            use_cuda_graph=False, **more,
        )  # fmt: skip
