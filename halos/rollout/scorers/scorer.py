"""The contract of a scorer, and the one that a configuration names: a new scorer is a file here, a name in the schema, a case."""

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
    """Scores samples one by one, in whatever order."""

    def name(self) -> str:
        """What files say of where their scores come from."""
        ...

    def request(self) -> dict[str, Any]:
        """Everything that decides the scores."""
        ...

    def score(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Score]]: ...


def open_scorer(
    settings: Settings, *, plugins: Sequence[str], cache_dir: str | Path, answers: Path, max_length: int | None = None,
    quiet: bool = True,
) -> Scorer:  # fmt: skip
    """A judge's answers are kept in the file `answers`; `max_length` is that of a reward model, whose weights are read with the
    first sample. Raises UserError for what cannot score."""
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
    """Of a run that has not begun. Raises UserError for what could not score its samples."""
    assert config.online is not None
    settings = config.online.scorer
    if settings.name == "reward_model" and settings.model is not None:
        check_model(settings.model, "online.scorer.model")
    scorer = open_scorer(settings, plugins=config.plugins, cache_dir=config.cache_dir, answers=answers)
    if settings.name == "judge" and settings.url is not None:
        from halos.rollout.servers import refuse_silent

        refuse_silent(settings.url, "online.scorer.url")
    return scorer


def refuse_unscorable(config: Config, prompts: Sequence[Prompt]) -> None:
    """Raises UserError where a function asks for a column that no prompt has: tried on a made-up answer to the first one."""
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
                f"online.scorer.functions: {part.path.removeprefix(f'{OWN}.')} needs {_named(column)}, and none of the"
                f" {len(prompts)} prompts of data.train has one"
            )


def _named(column: str) -> str:
    """A column as people would write it in their data."""
    return "a column `solution` or `answer` (or a right completion)" if column == "solution" else f"a column `{column}`"
