"""The engine hf, the default: transformers' continuous batching, with a fixed cache size and a seed for each request."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halos.config.schema import Sampler
from halos.rollout.engines.engine import Engine, stop_ids
from halos.rollout.types import Origin, Request, Sample

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from halos.rollout.engines._seeded_sampling import SeededSampling

log = logging.getLogger(__name__)

PAGE = 32  # tokens of one page of the key-value cache
MAX_BATCH_TOKENS = 4096  # of one forward pass, prompts included


class HFEngine(Engine):
    """A model in this process. It must be unsharded: FSDP's shards are gathered first."""

    takes = ("top_k", "cache_tokens")
    shares_batches = True
    loads_model = True
    addresses = ()

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Sampler, origin: Origin) -> None:
        self.model, self.tokenizer, self.settings, self.origin = model, tokenizer, settings, origin
        self.stops = stop_ids(model.generation_config, tokenizer)

    @classmethod
    def open(
        cls, settings: Sampler, origin: Origin, *, directory: Path | None, tokenizer: Any, model: Callable[[], Any], dtype: str
    ) -> HFEngine:
        return cls(model(), tokenizer, settings, origin)

    def sample(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """Queue all requests before the first step, so that the same list gives the same batches, bit for bit."""
        from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
        from transformers.generation.logits_process import LogitsProcessorList

        from halos.rollout.engines._seeded_sampling import SeededSampling

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
        try:
            with _keys_in_dtype_of_cache(), _logits_in_float32(self.model), _without_balancing(self.model):
                manager.start()
                yield from self._answers(manager, by_name, processor)
        finally:
            manager.destroy()
            self.model.set_attn_implementation(used)
            self.model.train(training)

    def _answers(self, manager: Any, by_name: dict[str, Request], processor: SeededSampling) -> Iterator[Sample]:
        left = set(by_name)
        try:
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

    def _sample(self, request: Request, ids: Sequence[int], logps: Sequence[float]) -> Sample:
        stopped = bool(ids) and ids[-1] in self.stops
        text = self.tokenizer.decode(list(ids[:-1] if stopped else ids), skip_special_tokens=True)
        assert isinstance(text, str)
        finish = "stop" if stopped else "length"
        return Sample.of(request, self.origin, text, finish=finish, tokens=len(ids), ids=ids, logps=logps)

    def _generation(self) -> GenerationConfig:
        from transformers import GenerationConfig

        return GenerationConfig(do_sample=False, eos_token_id=self.stops, pad_token_id=self.tokenizer.pad_token_id)

    def _batching(self, requests: Sequence[Request]) -> ContinuousBatchingConfig:
        from transformers import ContinuousBatchingConfig

        needed = [-(-(len(request.ids) + request.max_new_tokens) // PAGE) + 1 for request in requests]
        # it is zeroed for every call: no more than twice what all take together, which leaves the schedule that of a larger one;
        # and enough for the longest, which could never be scheduled otherwise
        pages = max(min(self.settings.cache_tokens // PAGE, 2 * sum(needed) + 8), max(needed) + 1)
        tokens = min(MAX_BATCH_TOKENS, max(self.settings.batch_size, max(len(request.ids) for request in requests)) * 2)
        known = inspect.signature(ContinuousBatchingConfig).parameters  # transformers 5.17 calls a page a block
        more: dict[str, Any] = {"page_size" if "page_size" in known else "block_size": PAGE}
        if "auto_switch_to_flash" in known:
            more["auto_switch_to_flash"] = False  # it would download a kernel from the hub, and use another attention
        return ContinuousBatchingConfig(
            num_blocks=pages, max_batch_tokens=tokens, max_requests_per_batch=self.settings.batch_size, use_async_batching=False,
            use_cuda_graph=False, **more,
        )  # fmt: skip


@contextmanager
def _keys_in_dtype_of_cache() -> Iterator[None]:
    """Within, keys and values are cast to the dtype of the cache: under autocast a rotary embedding leaves keys in float32."""
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    update = PagedAttentionCache.update

    @wraps(update)
    def cast(self: Any, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        return update(self, key_states.to(self.dtype), value_states.to(self.dtype), *args, **kwargs)

    PagedAttentionCache.update = cast
    try:
        yield
    finally:
        PagedAttentionCache.update = update


@contextmanager
def _logits_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Within, a plain head computes logits as it does in training: products in half precision have float32 sums. Under autocast a
    float32 weight is cast once, and not for every token."""
    from halos.logps import linear_head

    layer = linear_head.computing(model.get_output_embeddings())
    if not linear_head.is_plain(layer):
        yield
        return
    casts: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    def forward(input: Tensor) -> Tensor:
        dtype = linear_head.compute_dtype(layer.weight)
        if dtype not in casts:
            casts[dtype] = layer.weight.detach().to(dtype), None if layer.bias is None else layer.bias.detach().to(dtype)
        flat = linear_head.products(input.reshape(-1, input.shape[-1]).to(dtype), *casts[dtype])
        return flat.view(*input.shape[:-1], -1)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


@contextmanager
def _without_balancing(model: PreTrainedModel) -> Iterator[None]:
    """Within, a mixture does not return its routers' logits, of which transformers would compute a loss as it samples."""
    config = model.config.get_text_config()
    before = getattr(config, "output_router_logits", None)
    if before:
        config.output_router_logits = False
    try:
        yield
    finally:
        if before:
            config.output_router_logits = before


ENGINE = HFEngine
