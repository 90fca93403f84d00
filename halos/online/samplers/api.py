"""A model behind an OpenAI-compatible URL: text in, text out, its own chat template."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from halos.errors import UserError
from halos.online.samplers.request import Completion, Request

RETRIES = 6
TIMEOUT = 600.0  # seconds for one completion
KEY = "OPENAI_API_KEY"


class ChatEngine:
    """Knows no token ids: what is trained on is the text, tokenised anew."""

    def __init__(self, url: str, model: str, *, top_p: float, concurrency: int) -> None:
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise UserError("the sampler openai needs the package openai: pip install openai") from error
        if not os.environ.get(KEY):
            raise UserError(f"the key of {url} is read from {KEY}, which is not set (any word will do for a server without keys)")
        self.url, self.model, self.top_p, self.concurrency = url, model, top_p, concurrency

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Completion]]:
        loop = asyncio.new_event_loop()
        asking = self._ask_all(requests)
        try:
            while True:
                try:
                    yield loop.run_until_complete(anext(asking))
                except StopAsyncIteration:
                    return
        finally:
            loop.run_until_complete(asking.aclose())
            loop.close()

    async def _ask_all(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[Request, Completion], None]:
        import openai

        async with openai.AsyncOpenAI(base_url=self.url, max_retries=RETRIES, timeout=TIMEOUT) as client:
            gate = asyncio.Semaphore(self.concurrency)

            async def one(request: Request) -> tuple[Request, Completion]:
                async with gate:
                    return request, await self._ask(client, request)

            tasks = [asyncio.ensure_future(one(request)) for request in requests]
            try:
                for done in asyncio.as_completed(tasks):
                    yield await done
            except openai.APIError as error:
                raise UserError(f"{self.url} does not answer: {type(error).__name__}: {error}. What it has answered is kept: the"
                                " same command asks for the rest") from error  # fmt: skip
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, client: Any, request: Request) -> Completion:
        given = await client.chat.completions.create(
            model=self.model, messages=[dict(turn) for turn in request.messages], max_tokens=request.max_new_tokens,
            temperature=request.temperature, top_p=self.top_p, seed=request.seed % 2**31,
        )  # fmt: skip
        choice = given.choices[0]
        tokens = given.usage.completion_tokens if given.usage else 0
        return Completion(choice.message.content or "", (), (), "length" if choice.finish_reason == "length" else "stop", tokens)
