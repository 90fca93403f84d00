"""The base class of sampling engines. An engine is a module beside this one, whose subclass of Engine is named ENGINE."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from halos.config.engines import engine_class
from halos.config.schema import Sampler
from halos.errors import UserError
from halos.rollout.types import Origin, Request, Sample


class Engine(ABC):
    """Samples completions. What other code asks of an engine is declared here, and nobody asks for its name.

    The module is imported to read these declarations: import what is heavy in `open`, or later.
    """

    is_paid: bool = False  # each answer costs money: it is kept as it comes, and a prompt is never sent again after a crash
    reads_tokens: ClassVar[bool] = True  # it continues token ids, and needs the policy's files; else it takes text
    loads_model: ClassVar[bool] = False  # it samples from a model in this process: stages run on every rank, each with its own
    addresses: ClassVar[tuple[str, ...]] = ("python", "url")  # keys of programs and servers: never taken from a saved run

    @classmethod
    def problem(cls, settings: Sampler, spelled: Callable[[str], str]) -> str | None:
        """Return what is missing in `settings`, checked before anything loads; `spelled` gives a key as the user writes it."""
        return None

    @classmethod
    @abstractmethod
    def open(
        cls, settings: Sampler, origin: Origin, *, directory: Path | None, tokenizer: Any, model: Callable[[], Any]
    ) -> Engine:
        """Make one. `directory` holds the policy's weights, and `model` loads them; None and unused where it has text alone."""

    @classmethod
    def open_server(cls, settings: Sampler, origin: Origin, *, tokenizer: Any, model: str) -> PolicyServer | None:
        """Make the server that samples for a live loop; None where a model in this process does, for which `open` is called at
        every step. Raises UserError for an engine that cannot follow a policy. `model` is the name of the first policy."""
        if cls.loads_model:
            return None
        raise UserError(
            "a live loop samples with an engine whose weights can change at every step: online.sampler.name=hf, or vllm with"
            f" online.sampler.url of a running server, not {settings.name}"
        )

    @abstractmethod
    def sample(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """Yield a sample for each request as they come, in whatever order."""


class PolicyServer(Engine):
    """An engine outside this process that can be given new weights."""

    @abstractmethod
    def load(self, weights: Path) -> None:
        """Sample from the weights in a directory that the server can reach from now on."""


def open_engine(settings: Sampler, origin: Origin, *, directory: Path | None, tokenizer: Any, model: Callable[[], Any]) -> Engine:
    """Open the engine that the settings name."""
    return engine_class(settings.name).open(settings, origin, directory=directory, tokenizer=tokenizer, model=model)
