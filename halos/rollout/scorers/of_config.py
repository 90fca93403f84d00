"""The scorer that a configuration names, and whether it can score what the data has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halos.config.schema import Config
from halos.confined import expanded
from halos.errors import UserError
from halos.rollout.scorers.functions import OWN, Functions, parts_of, try_on
from halos.rollout.scorers.score import Labeller
from halos.rollout.servers import refuse_silent
from halos.rollout.types import Row


def scorer_of(config: Config, cache: Path) -> Labeller:
    """For a live loop, which needs scores; a judge's answers are kept in `cache`. Raises UserError for what cannot score."""
    assert config.online is not None
    given = config.online.scorer
    if given.name == "function":
        parts = parts_of(given.functions, config.plugins)
        return Functions(parts, processes=given.processes, timeout=given.timeout, plugins=config.plugins)
    if given.model is None:
        raise UserError("online.scorer.model is missing: the reward model's directory, or the judge's name at its API")
    if given.name == "reward_model":
        return reward_model_of(config)
    if given.pairwise:
        raise UserError("online.scorer.pairwise is of rounds: a live loop needs scores")
    return judge_of(config, cache)


def reward_model_of(config: Config) -> Labeller:
    """Its weights are read with the first sample."""
    from halos.models.locate import locate
    from halos.rollout.scorers.reward_model import RewardModel

    assert config.online is not None
    given = config.online.scorer
    place = locate(str(given.model), None, expanded(config.cache_dir), key="online.scorer.model")
    return RewardModel(place, label=given.label, batch_size=given.batch_size, max_length=None, quiet=True)


def judge_of(config: Config, cache: Path) -> Any:
    from halos.rollout.scorers.judge import Judge, Settings

    assert config.online is not None
    given = config.online.scorer
    settings = Settings(
        model=str(given.model), url=given.url, rubric=Path(given.rubric) if given.rubric else None, concurrency=given.concurrency,
        max_requests=given.max_requests, max_cost=given.max_cost, price_in=given.price_in, price_out=given.price_out, cache=cache,
    )  # fmt: skip
    judge = Judge(settings, pairwise=given.pairwise)
    if given.url is not None:
        refuse_silent(given.url, "online.scorer.url")
    return judge


def refuse_unscorable(config: Config, prompts: Sequence[Row]) -> None:
    """Raises UserError where a function asks for a column that no prompt has: tried on a made-up answer to the first one."""
    assert config.online is not None
    given = config.online.scorer
    if given.name != "function":
        return
    for part in parts_of(given.functions, config.plugins):
        tried = try_on(part, _answered(prompts[0]), plugins=config.plugins, timeout=given.timeout)
        for column in tried.lacking:
            if any(row.get(column) is not None for row in prompts):
                continue
            raise UserError(
                f"online.scorer.functions: {part.path.removeprefix(f'{OWN}.')} needs {_named(column)}, and none of the"
                f" {len(prompts)} prompts of data.train has one"
            )


def _named(column: str) -> str:
    """A column as people would write it in their data."""
    return "a column `solution` or `answer` (or a right completion)" if column == "solution" else f"a column `{column}`"


def _answered(prompt: Row) -> Row:
    """A prompt as a sample of it would come."""
    said: Mapping[str, Any] = {"type": "sample", "sample_id": 0, "output": "1", "finish": "stop", "tokens": 1, "seed": 0}
    return {**said, "temperature": 1.0, "generator": "policy", "split": "train", **prompt}
