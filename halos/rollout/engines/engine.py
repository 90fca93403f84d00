"""The contract of an engine, and the one that a configuration names. A new one is a file, its name in the schema, and a case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from halos.config.schema import Sampler
from halos.rollout.types import Origin, Request, Sample


class Engine(Protocol):
    """Gives samples as they come, in whatever order."""

    is_paid: bool  # each answer has its price, so that it is kept at once, and never asked for again

    def sample(self, requests: Sequence[Request]) -> Iterator[Sample]: ...


def open_engine(settings: Sampler, origin: Origin, *, directory: Path | None, tokenizer: Any, model: Callable[[], Any]) -> Engine:
    """`directory` holds the policy's weights and `model` loads them; both and the tokenizer are of engines that know tokens."""
    if settings.name == "hf":
        from halos.rollout.engines.hf import HFEngine  # each engine's imports are its own

        return HFEngine(model(), tokenizer, settings, origin)
    if settings.name == "openai":
        from halos.rollout.engines.openai import ChatEngine

        return ChatEngine(settings, origin)
    from halos.rollout.engines.vllm import ServerEngine, SubprocessEngine

    if settings.url:
        return ServerEngine(tokenizer, settings, origin)
    return SubprocessEngine(str(directory), tokenizer, settings, origin)
