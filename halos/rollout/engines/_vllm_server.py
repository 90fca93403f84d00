"""A running `vllm serve`, whose completions API takes token ids and returns token ids with log-probs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from halos.config.schema import Sampler
from halos.distributed.environment import world_size
from halos.errors import UserError
from halos.rollout.engines._token_engine import TokenEngine, stops_of
from halos.rollout.engines.engine import PolicyServer
from halos.rollout.servers import CONNECT_TIMEOUT, KEY, concurrently, connections, post
from halos.rollout.types import Origin, Request, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TIMEOUT = 3600.0  # seconds for one completion, of which the server sends nothing before its end
REMEDIES = {
    404: "start it with VLLM_SERVER_DEV_MODE=1, without which it takes no weights",
    500: "a live loop needs a vLLM whose reload_weights takes a directory (weights_path), which both can read",
}
NAME = "online.sampler.model is the model's name there, which GET /v1/models lists (--served-model-name)"


class ServerEngine(TokenEngine, PolicyServer):
    """Every rank keeps its share of the requests that the server runs at once in flight. Requests that fail are sent again, with
    the same seed, so that a restart of the server changes no sample: weights that it was given are loaded again first."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: Sampler, origin: Origin, *, stops: Sequence[int],
        model: str | None = None,
    ) -> None:  # fmt: skip
        """`model` is the model's name on the server, unless `settings.model` gives it; by default the generator's name."""
        super().__init__(tokenizer, settings, origin, stops=stops)
        assert settings.url is not None
        self.url, self.model = settings.url.rstrip("/"), settings.model or model or origin.generator
        self._losses = self._losses_loaded = 0  # how often it was lost, and of those, before its weights were loaded

    @classmethod
    def open(
        cls, settings: Sampler, origin: Origin, *, directory: Path | None, tokenizer: Any, model: Callable[[], Any], dtype: str
    ) -> ServerEngine:
        assert directory is not None
        return cls(tokenizer, settings, origin, stops=stops_of(directory, tokenizer))

    @property
    def where(self) -> str:
        return self.url

    def sample(self, requests: Sequence[Request]) -> Iterator[Sample]:
        limit, loading = -(-self.in_flight // world_size()), asyncio.Lock()

        async def ask(client: httpx.AsyncClient, request: Request) -> Sample:
            async def ready() -> None:
                async with loading:
                    if self._losses != self._losses_loaded and self.weights is not None:
                        await self._load(client, self.weights)

            return await self._ask(client, request, ready)

        with closing(concurrently(requests, ask, client=self._client(limit), limit=limit, paid=False)) as samples:
            yield from samples

    def probe(self, requests: Sequence[Request]) -> list[Sample]:
        whole = copy(self)
        whole.settings = replace(self.settings, top_p=1.0, top_k=0)
        return list(whole.sample(requests))

    def _client(self, limit: int) -> httpx.AsyncClient:
        key = os.environ.get(KEY)
        return httpx.AsyncClient(timeout=httpx.Timeout(TIMEOUT, connect=CONNECT_TIMEOUT), limits=connections(limit),
                                 headers={"Authorization": f"Bearer {key}"} if key else {})  # fmt: skip

    async def _ask(self, client: httpx.AsyncClient, request: Request, ready: Callable[[], Awaitable[None]]) -> Sample:
        body = {"model": self.model, "prompt": list(request.ids), "n": 1, "return_token_ids": True, **self._parameters(request)}
        answer = await post(client, f"{self.url}/completions", body, remedies={404: NAME}, lost=self._lose, ready=ready)
        choice = answer["choices"][0]
        if not choice.get("token_ids") or not (choice.get("logprobs") or {}).get("token_logprobs"):
            missing = "log-probs" if choice.get("token_ids") else "token_ids"
            raise UserError(f"{self.url} returns no {missing}: online.sampler.name=vllm needs a vLLM server from 0.10.2 on")
        return self._sample(request, choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"])

    def _lose(self) -> None:
        self._losses += 1

    # --- the weights of a live loop --------------------------------------------------------------------------------------

    def load(self, weights: Path) -> None:
        """Make the server reload its weights from a directory that it can reach, and drop its prefix cache.

        The server offers this only with VLLM_SERVER_DEV_MODE=1. Raises UserError otherwise.
        """

        async def load() -> None:
            async with self._client(1) as client:
                await self._load(client, weights)

        asyncio.run(load())

    async def _load(self, client: httpx.AsyncClient, weights: Path) -> None:
        root, reload = self.url.removesuffix("/v1"), {"method": "reload_weights", "kwargs": {"weights_path": str(weights)}}
        losses = -1
        while losses != self._losses:  # it may have been lost after the first was answered
            losses = self._losses
            for path, body in (("collective_rpc", reload), ("reset_prefix_cache", dict[str, Any]())):
                await post(client, f"{root}/{path}", body, remedies=REMEDIES, lost=self._lose)
        self._losses_loaded = losses
