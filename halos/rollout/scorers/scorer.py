"""The base class of scorers. A scorer is a module in this package, whose subclass of Scorer is named SCORER."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

from halos.config.rollout_modules import scorer_class
from halos.config.schema import Config
from halos.config.schema import Scorer as Settings
from halos.hashes import file_hash
from halos.rollout.types import Prompt, Sample, Score


@dataclass(frozen=True, slots=True)
class Option:
    """The option of halos.online.label that chooses a scorer. Its value becomes that of `key`, one of online.scorer's that takes
    text or a list; for a list the option may be repeated. Without a key it is a flag. No key that is given so has another option.
    """

    flag: str
    help: str
    key: str | None = None
    metavar: str = "VALUE"


@dataclass(frozen=True, slots=True)
class Context:
    """What a scorer may use besides its settings."""

    answers: Path  # a file of its own, for what a further attempt need not pay for or compute again
    plugins: Sequence[str] = ()  # the user's packages that its settings may name
    cache_dir: str | Path = "~/.cache/halos"
    max_length: int | None = None  # in tokens: a longer sample gets no score from a scorer that reads tokens
    quiet: bool = True  # no progress bar
    day: date | None = None  # that a chat template writes; None: the day of its use


class Scorer(ABC):
    """Scores samples, each by itself, in any order. Its class declares everything that other code must know about it; no code
    asks for its name.

    Modules are imported to read these declarations: import heavy packages in `open`, or later.
    """

    option: ClassVar[Option]
    takes: ClassVar[tuple[str, ...]] = ()  # the keys of online.scorer that it reads; others are refused where a user gives them
    loads_model: ClassVar[bool] = False  # it scores with a model in this process; a stage then runs on every rank
    is_paid: ClassVar[bool] = False  # its answers cost money: one process asks for all, so that one budget counts them
    compares: ClassVar[bool] = False  # it can compare two samples (online.scorer.pairwise): a subclass of PairwiseScorer
    paths: ClassVar[tuple[str, ...]] = ()  # keys that name a file or a model: a resume compares what these hold, not the names
    addresses: ClassVar[tuple[str, ...]] = ("url",)  # keys that name servers: never taken from a saved run
    reads_columns: ClassVar[bool] = False  # its scores depend on columns of the data, which a resume then compares
    recorded_since: ClassVar[tuple[str, ...]] = ()  # entries of its request that older versions did not record
    full_marks: ClassVar[float | None] = None  # the reward of a right answer, unless online.pass_reward says; None: any scale
    date: str | None = None  # that its chat template writes, of an instance

    @classmethod
    def problem(cls, settings: Settings, spelled: Callable[[str], str]) -> str | None:
        """Return what is wrong with `settings`, checked before anything loads; `spelled` gives a key as the user writes it."""
        return None

    @classmethod
    def content(cls, settings: Settings, *, cache: Path) -> dict[str, str | None]:
        """Return hashes of the files and models that the settings name, by key, which a resume compares; None for a key that
        names nothing."""
        return {key: _hash_of(getattr(settings, key), cache) for key in cls.paths}

    @classmethod
    def code(cls, settings: Settings, *, plugins: Sequence[str]) -> dict[str, str | None]:
        """Return hashes of the user's code that the settings name, by key, which a resume and a finished run compare."""
        return {}

    @classmethod
    def metrics(cls, settings: Settings) -> tuple[str, ...]:
        """Return the names of metrics of an evaluation that only this scorer gives; objective.metric may name one."""
        return ()

    @classmethod
    @abstractmethod
    def open(cls, settings: Settings, context: Context) -> Scorer:
        """Open the scorer; load weights with the first sample. Raises UserError for settings that cannot score."""

    def load(self) -> None:
        """Load what it scores with, such as a model's weights, before the first sample and in time that is not scoring's."""
        return

    def check_ready(self) -> None:
        """Raises UserError where it could not score now, because a server does not answer, say. Asked before a run begins."""
        return

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError where it reads something that none of a run's prompts has. Asked before the first is sampled."""
        return

    def needs_groups(self) -> bool:
        """Whether a score depends on the other samples of its prompt: these are then scored together, by one process."""
        return False

    @abstractmethod
    def name(self) -> str:
        """The name of the scorer, as recorded in files with its scores."""

    @abstractmethod
    def request(self) -> dict[str, Any]:
        """Everything that the scores depend on, as JSON."""

    @abstractmethod
    def score(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Score]]:
        """Yield every sample with its score, in any order; where it needs groups, the samples of a prompt one after the other."""

    def close(self) -> None:
        """End the processes that it has started, if any: the next sample starts others."""
        return


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which of two samples is better: `A`, the first, `B`, `tie`, or None where the answer was none of these."""

    better: str | None
    answer: str  # in full
    finish: str
    cost: float


class PairwiseScorer(Scorer):
    """A scorer that compares two samples where online.scorer.pairwise is true."""

    compares = True

    @abstractmethod
    def compare(self, pairs: Sequence[tuple[Sample, Sample]]) -> Iterator[tuple[int, Verdict]]:
        """Yield every pair's number with its verdict, in any order."""


def open_scorer(settings: Settings, context: Context) -> Scorer:
    """Open the scorer that the settings name. Raises UserError for settings that cannot score."""
    return scorer_class(settings.name).open(settings, context)


def scorer_of(config: Config, answers: Path, day: date | None = None) -> Scorer:
    """Open the scorer of a run of `day`, checked before the run begins. Raises UserError where it could not score."""
    assert config.online is not None
    scorer = open_scorer(config.online.scorer, Context(answers, config.plugins, config.cache_dir, day=day))
    scorer.check_ready()
    return scorer


def _hash_of(path: str | None, cache: Path) -> str | None:
    if path is None or Path(path).is_file():
        return None if path is None else file_hash(Path(path))
    from halos.checkpoint.lineage import identity  # here: it imports torch
    from halos.models.locate import locate

    return identity(locate(path, None, cache), cache)
