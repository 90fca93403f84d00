"""The base class of sampling engines. An engine is a module in this package, whose subclass of Engine is named ENGINE."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from halos.config.rollout_modules import engine_class
from halos.config.schema import Sampler
from halos.errors import UserError
from halos.rollout.types import Origin, Request, Sample


class Engine(ABC):
    """Samples completions. Its class declares everything that other code must know about it; no code asks for its name.

    Modules are imported to read these declarations: import heavy packages in `open`, or later.
    """

    takes: ClassVar[tuple[str, ...]] = ()  # the keys of online.sampler that it reads besides those that all do
    is_paid: bool = False  # answers cost money: each is stored as it comes, and none is requested again after a crash
    reads_tokens: ClassVar[bool] = True  # it takes token ids, and needs the policy's tokenizer; else it takes text
    shares_batches: ClassVar[bool] = False  # answers depend, by rounding, on the other requests of a call: these stay together
    loads_model: ClassVar[bool] = False  # it samples from a model in this process; a stage then runs on every rank
    addresses: ClassVar[tuple[str, ...]] = ("python", "url")  # keys that name programs and servers: never taken from a saved run

    @classmethod
    def problem(cls, settings: Sampler, spelled: Callable[[str], str]) -> str | None:
        """Return what is missing in `settings`, checked before anything loads; `spelled` gives a key as the user writes it."""
        return None

    @classmethod
    def check_ready(cls, settings: Sampler) -> None:
        """Raises UserError where it could not sample now, because a server does not answer, say. Asked before a run begins."""
        return

    @classmethod
    @abstractmethod
    def open(
        cls, settings: Sampler, origin: Origin, *, directory: Path | None, tokenizer: Any, model: Callable[[], Any], dtype: str
    ) -> Engine:
        """Open the engine. `directory` holds the policy's weights, and `model` loads them in `dtype`; unused by an engine that
        takes text."""

    @classmethod
    def open_server(cls, settings: Sampler, origin: Origin, *, tokenizer: Any, model: str) -> PolicyServer | None:
        """Open the server that samples for a live loop; None where a model in this process samples, for which `open` is called at
        every step. Raises UserError for an engine whose weights cannot be replaced. `model` is the name of the first policy."""
        if cls.loads_model:
            return None
        raise UserError(
            "a live loop samples with an engine whose weights can change at every step: online.sampler.name=hf, or vllm with"
            f" online.sampler.url of a running server, not {settings.name}"
        )

    @abstractmethod
    def sample(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """Yield a sample for each request, in any order."""

    def probe(self, requests: Sequence[Request]) -> list[Sample]:
        """Answer these few from the whole distribution, without top_p and top_k, so that they can be compared with the policy
        before many are asked for; empty for an engine that was started with the policy's own weights and settings."""
        return []

    @property
    def where(self) -> str:
        """The engine, for messages."""
        return type(self).__name__

    def close(self) -> None:
        """Give back what it holds, such as the memory of a GPU. It samples no more."""
        return


class PolicyServer(Engine):
    """An engine outside this process whose weights can be replaced. `stops` are the ids that end a completion of the policy, and
    `weights` those that it must sample from, also after a restart; a live loop sets both on every rank."""

    stops: tuple[int, ...] = ()
    weights: Path | None = None

    @abstractmethod
    def load(self, weights: Path) -> None:
        """Load the weights from a directory that the server can reach; later samples come from them."""


def open_engine(
    settings: Sampler, origin: Origin, *, directory: Path | None, tokenizer: Any, model: Callable[[], Any], dtype: str
) -> Engine:
    """Open the engine that the settings name."""
    engine = engine_class(settings.name)
    return engine.open(settings, origin, directory=directory, tokenizer=tokenizer, model=model, dtype=dtype)


def stop_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    """The ids that end a completion: those of a model's generation config, and the tokenizer's."""
    own = generation_config.eos_token_id if generation_config is not None else None
    stops = [own] if isinstance(own, int) else list(own or [])
    return sorted({*stops, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])})
