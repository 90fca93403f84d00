"""The engine openai: a model behind an OpenAI-compatible URL, which takes and returns text and has its own chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from halos.config.schema import Sampler
from halos.data.messages import OURS, SETTINGS
from halos.redaction import without_values
from halos.rollout.engines.engine import Engine
from halos.rollout.servers import answers, refuse_unreachable, require_client
from halos.rollout.types import Origin, Request, Sample

TIMEOUT = 600.0  # seconds for one completion
IN_FLIGHT = 16  # requests by default: answers are paid for, and providers limit their rate


class ChatEngine(Engine):
    """Returns text without token ids, so the text is tokenised again for training."""

    takes = ("url", "model", "concurrency")
    is_paid = True
    reads_tokens = False
    addresses = ("url",)

    @classmethod
    def problem(cls, settings: Sampler, spelled: Callable[[str], str]) -> str | None:
        if settings.url is None:
            return f"{spelled('url')} is missing: the sampler openai needs one, such as http://localhost:8000/v1"
        return None

    @classmethod
    def check_ready(cls, settings: Sampler) -> None:
        require_client("the sampler openai")
        assert settings.url is not None
        refuse_unreachable(settings.url, "online.sampler.url")

    @classmethod
    def open(
        cls, settings: Sampler, origin: Origin, *, directory: Path | None, tokenizer: Any, model: Callable[[], Any], dtype: str
    ) -> ChatEngine:
        return cls(settings, origin)

    def __init__(self, settings: Sampler, origin: Origin) -> None:
        require_client("the sampler openai")
        self.settings, self.origin, self.model = settings, origin, settings.model or origin.generator

    def sample(self, requests: Sequence[Request]) -> Iterator[Sample]:
        concurrency = self.settings.concurrency or IN_FLIGHT
        return answers(requests, self._ask, url=self.settings.url, concurrency=concurrency, timeout=TIMEOUT)

    async def _ask(self, client: Any, request: Request) -> Sample:
        turns = [{name: value for name, value in turn.items() if name not in OURS} for turn in request.prompt.turns]
        settings = dict(request.prompt.turns[0].get(SETTINGS) or {})
        more = {"tools": tools} if (tools := settings.pop("tools", None)) else {}
        more |= {"extra_body": {SETTINGS: settings}} if settings else {}
        response = await client.chat.completions.create(
            model=self.model, messages=turns, max_tokens=request.max_new_tokens, temperature=request.temperature,
            top_p=self.settings.top_p, seed=request.seed % 2**31, **more,
        )  # fmt: skip
        choice = response.choices[0]
        tokens = response.usage.completion_tokens if response.usage else 0
        finish = "length" if choice.finish_reason == "length" else "stop"
        return Sample.of(request, self.origin, without_values(choice.message.content or ""), finish=finish, tokens=tokens)


ENGINE = ChatEngine
