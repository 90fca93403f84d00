"""The protocol of scorers, and how a configuration opens one. A new scorer: a file here, a name in the schema, a case below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from halos.config.paths import check_model
from halos.config.schema import Config
from halos.config.schema import Scorer as Settings
from halos.confined import expanded
from halos.errors import UserError
from halos.rollout.scorers.functions import OWN, Functions, parts_of, try_on
from halos.rollout.types import Prompt, Sample, Score


class Scorer(Protocol):
    """Scores samples, each by itself, in any order."""

    def name(self) -> str:
        """The name of the scorer, as recorded in files with its scores."""
        ...

    def request(self) -> dict[str, Any]:
        """Everything that the scores depend on, as JSON."""
        ...

    def score(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Score]]: ...


def open_scorer(
    settings: Settings, *, plugins: Sequence[str], cache_dir: str | Path, answers: Path, max_length: int | None = None,
    quiet: bool = True,
) -> Scorer:  # fmt: skip
    """The scorer that the settings name. A judge caches its answers in the file `answers`; `max_length` is for a reward model,
    whose weights are loaded with the first sample. Raises UserError for settings that cannot score."""
    if settings.name == "function":
        return Functions(parts_of(settings.functions, plugins), settings, plugins)
    if settings.model is None:
        what = "its directory or hub id" if settings.name == "reward_model" else "the judge's name at its API"
        raise UserError(f"online.scorer.model is missing: {what}")
    if settings.name == "judge":
        from halos.rollout.scorers.judge import Judge  # each scorer's imports are its own

        return Judge(settings, answers)
    from halos.models.locate import locate
    from halos.rollout.scorers.reward_model import RewardModel

    directory = locate(settings.model, None, expanded(cache_dir), key="online.scorer.model")
    return RewardModel(directory, settings, max_length=max_length, quiet=quiet)


def scorer_of(config: Config, answers: Path) -> Scorer:
    """The scorer of a run, checked before the run begins. Raises UserError where it could not score."""
    assert config.online is not None
    settings = config.online.scorer
    if settings.name == "reward_model" and settings.model is not None:
        check_model(settings.model, "online.scorer.model")
    scorer = open_scorer(settings, plugins=config.plugins, cache_dir=config.cache_dir, answers=answers)
    if settings.name == "judge" and settings.url is not None:
        from halos.rollout.servers import refuse_unreachable

        refuse_unreachable(settings.url, "online.scorer.url")
    return scorer


def refuse_unscorable(config: Config, prompts: Sequence[Prompt]) -> None:
    """Raises UserError where a function reads a column that no prompt has, tried on a made-up answer to the first prompt."""
    assert config.online is not None
    settings = config.online.scorer
    if settings.name != "function":
        return
    first = prompts[0]
    sample = Sample(first, 0, "1", finish="stop", tokens=1, seed=0, temperature=1.0, generator="policy")
    for part in parts_of(settings.functions, config.plugins):
        for column in try_on(part, sample, settings, config.plugins).lacking:
            if any(prompt.columns.get(column) is not None for prompt in prompts):
                continue
            raise UserError(
                f"online.scorer.functions: {part.path.removeprefix(f'{OWN}.')} needs {_describe(column)}, and none of the"
                f" {len(prompts)} prompts of data.train has one"
            )


def _describe(column: str) -> str:
    """A column as users write it in their data."""
    return "a column `solution` or `answer` (or a right completion)" if column == "solution" else f"a column `{column}`"
