"""A model behind an OpenAI-compatible URL: text in, text out, its own chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from halos.rollout.servers import answers, refuse_without
from halos.rollout.types import Completion, Request

TIMEOUT = 600.0  # seconds for one completion


class ChatEngine:
    """Knows no token ids: what is trained on is the text, tokenised anew."""

    def __init__(self, url: str, model: str, *, top_p: float, concurrency: int) -> None:
        refuse_without("the sampler openai")
        self.url, self.model, self.top_p, self.concurrency = url, model, top_p, concurrency

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Completion]]:
        return answers(requests, self._ask, url=self.url, concurrency=self.concurrency, timeout=TIMEOUT)

    async def _ask(self, client: Any, request: Request) -> tuple[Request, Completion]:
        given = await client.chat.completions.create(
            model=self.model, messages=[dict(turn) for turn in request.messages], max_tokens=request.max_new_tokens,
            temperature=request.temperature, top_p=self.top_p, seed=request.seed % 2**31,
        )  # fmt: skip
        choice = given.choices[0]
        tokens = given.usage.completion_tokens if given.usage else 0
        finish = "length" if choice.finish_reason == "length" else "stop"
        return request, Completion(choice.message.content or "", (), (), finish, tokens)
