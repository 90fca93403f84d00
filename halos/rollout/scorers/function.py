"""Verifiable rewards: functions of the text, run in worker processes so that none can block or crash the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

from halos.config.plugins import code_hash
from halos.config.schema import Scorer as Settings
from halos.errors import UserError
from halos.hashes import json_hash
from halos.rollout.rows import DATA
from halos.rollout.scorers._aggregate import NORMALISED, normalised, weighted_sum
from halos.rollout.scorers._evaluate import RESERVED, SOLUTION, Outcome, Rows, evaluate
from halos.rollout.scorers._reward_functions import OWN, Part, names_of, parts_of, source_hash
from halos.rollout.scorers._workers import Pool, Task
from halos.rollout.scorers.scorer import Context, Option, Scorer
from halos.rollout.types import TRAIN, Prompt, Sample, Score

WAIT = 0.2  # seconds between looks at time-outs


class Functions(Scorer):
    """A weighted sum of functions. A sample for which one raises, hangs or crashes twice gets no score, and is counted."""

    option = Option(
        "--reward", "a function of halos.online.rewards, a dotted path, or a mapping such as '{function: length, weight: 0.1,"
        " target: 50}'; several are added up", key="functions", metavar="NAME",
    )  # fmt: skip
    takes = ("functions", "aggregation", "processes", "concurrency", "timeout")
    addresses = ()
    reads_columns = True
    recorded_since = ("code", "aggregation")
    full_marks = 1.0  # of exact_match, maths and most of a user's own

    @classmethod
    def code(cls, settings: Settings, *, plugins: Sequence[str]) -> dict[str, str | None]:
        codes = {part.path: code_hash(part.path) for part in parts_of(settings.functions, plugins)}
        return {"functions": json_hash(codes) if any(codes.values()) else None}

    @classmethod
    def metrics(cls, settings: Settings) -> tuple[str, ...]:
        paths = [str(each.get("function") if isinstance(each, Mapping) else each) for each in settings.functions]
        return tuple(f"function/{name}" for name in names_of(paths)) if len(paths) > 1 else ()

    @classmethod
    def open(cls, settings: Settings, context: Context) -> Functions:
        return cls(parts_of(settings.functions, context.plugins), settings, context.plugins)

    def __init__(self, parts: Sequence[Part], settings: Settings, plugins: Sequence[str]) -> None:
        self.parts, self.settings, self.plugins = list(parts), settings, list(plugins)
        self._codes = self._code_hashes()
        by_number = dict(enumerate(self.parts))
        timeout, check = settings.timeout, self._refuse_edited
        self._pools = {
            False: Pool({n: part for n, part in by_number.items() if not part.is_async}, plugins, processes=settings.processes,
                        in_flight=1, timeout=timeout, check=check),
            True: Pool({n: part for n, part in by_number.items() if part.is_async}, plugins, processes=1,
                       in_flight=settings.concurrency, timeout=timeout, check=check),
        }  # fmt: skip

    def needs_groups(self) -> bool:
        return self.settings.aggregation == NORMALISED or any(part.is_grouped for part in self.parts)

    # --- before a run ----------------------------------------------------------------------------------------------------

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError where a function reads a column that no prompt has, tried on a made-up answer to the first prompt."""
        prompt = replace(prompts[0], split=TRAIN)
        sample = Sample(prompt, 0, "1", finish="stop", tokens=1, seed=0, temperature=1.0, ids=(1,), generator="policy",
                        vocabulary="its tokenizer")  # fmt: skip
        for part in self.parts:
            for column in self._try(part, sample).lacking:
                if not any(_has(prompt, column) for prompt in prompts):
                    raise UserError(
                        f"online.scorer.functions: {part.path.removeprefix(f'{OWN}.')} needs {_describe(column, prompts)}, and"
                        f" none of the {len(prompts)} prompts of data.train has one"
                    )

    def _try(self, part: Part, sample: Sample) -> Score:
        """Try one function on one sample: a bundled one in this process, a user's in a worker, where it cannot block the run."""
        if part.path.startswith(f"{OWN}."):
            return weighted_sum([part], evaluate([(part, part.load())], Rows.of([sample]))[0])
        alone = Functions([part], replace(self.settings, processes=1), self.plugins)
        try:
            return next(score for _, score in alone.score([sample]))
        finally:
            alone.close()

    def name(self) -> str:
        return " + ".join(part.path.removeprefix(f"{OWN}.") if part.weight == 1 else f"{part.weight:g} {part.path}"
                          for part in self.parts)  # fmt: skip

    def request(self) -> dict[str, Any]:
        """Everything that decides the scores, the functions' source code and all that a user's own import included."""
        codes = self._code_hashes()
        return {"functions": [[part.path, part.weight, dict(part.settings), source_hash(part.path)] for part in self.parts],
                **({"code": json_hash(codes)} if codes else {}), "timeout": self.settings.timeout,
                "aggregation": self.settings.aggregation}  # fmt: skip

    def _code_hashes(self) -> dict[str, str]:
        """Hash the user's own functions, by path."""
        return {part.path: code for part in self.parts if (code := code_hash(part.path)) is not None}

    def _refuse_edited(self) -> None:
        """Raises UserError for code that was edited: a new process would import another version than those before it."""
        now = self._code_hashes()
        if edited := [path for path, code in self._codes.items() if now.get(path) != code]:
            raise UserError(f"the code of the reward {edited[0]} has been edited since this process read it: start a new process")

    # --- scoring -----------------------------------------------------------------------------------------------------------

    def score(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Score]]:
        """Yield scores as they come: of one sample, or of all of a prompt where one depends on the others."""
        units = _groups(samples) if self.needs_groups() else [(number,) for number in range(len(samples))]
        unit_of = {number: unit for unit in units for number in unit}
        outcomes: dict[int, dict[int, Outcome]] = {number: {} for number in unit_of}
        open_calls = dict.fromkeys(units, 0)
        for pool, task in self._tasks(samples, units):
            pool.submit([task])
            open_calls[unit_of[task.numbers[0]]] += 1
        try:
            for task, answers in self._run():
                for number, answer in zip(task.numbers, answers, strict=True):
                    outcomes[number] |= _by_part(task, answer)
                unit = unit_of[task.numbers[0]]
                open_calls[unit] -= 1
                if not open_calls[unit]:
                    scores = self._scores([_joined(outcomes.pop(number), len(self.parts)) for number in unit])
                    yield from zip((samples[number] for number in unit), scores, strict=True)
        finally:
            if any(pool.is_busy for pool in self._pools.values()):
                self.close()  # the caller has stopped: nobody will receive what they are computing

    def _tasks(self, samples: Sequence[Sample], units: Sequence[tuple[int, ...]]) -> Iterator[tuple[Pool, Task]]:
        """The calls that give the samples their scores: the functions of a kind are called together."""
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for number, part in enumerate(self.parts):
            kinds.setdefault((part.is_async, part.is_grouped), []).append(number)
        for unit in units:
            for (is_async, is_grouped), parts in kinds.items():
                for numbers in [unit] if is_grouped else [(number,) for number in unit]:
                    yield self._pools[is_async], Task(tuple(parts), numbers, [samples[number] for number in numbers])

    def _run(self) -> Iterator[tuple[Task, list[Outcome]]]:
        pools = list(self._pools.values())
        while any(pool.is_busy for pool in pools):
            wait([each for pool in pools for each in pool.feed()], timeout=WAIT)
            for pool in pools:
                yield from pool.collect()

    def _scores(self, outcomes: Sequence[Outcome]) -> list[Score]:
        scores = [weighted_sum(self.parts, outcome) for outcome in outcomes]
        if self.settings.aggregation != NORMALISED:
            return scores
        return [replace(score, normalised=value) for score, value in zip(scores, normalised(self.parts, outcomes), strict=True)]

    def close(self) -> None:
        """Kill the workers."""
        for pool in self._pools.values():
            pool.close()


def _groups(samples: Sequence[Sample]) -> list[tuple[int, ...]]:
    """The numbers of the samples of each prompt."""
    groups: dict[tuple[str, str | None], list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault((sample.prompt.id, sample.prompt.split), []).append(number)
    return [tuple(numbers) for numbers in groups.values()]


def _by_part(task: Task, outcome: Outcome) -> dict[int, Outcome]:
    """An outcome of a call as one of each of its functions."""
    if outcome.problem:
        return dict.fromkeys(task.parts, outcome)
    return {part: Outcome((value,)) for part, value in zip(task.parts, outcome.values, strict=True)}


def _joined(by_part: dict[int, Outcome], count: int) -> Outcome:
    """The outcomes of all functions as one; the first problem is that of the whole."""
    ordered = [by_part[number] for number in range(count)]
    failed = next((outcome for outcome in ordered if outcome.problem), None)
    return failed or Outcome(tuple(value for outcome in ordered for value in outcome.values))


def _has(prompt: Prompt, column: str) -> bool:
    within, _, name = column.rpartition(".")
    columns = prompt.data if within == DATA else {**prompt.data, **prompt.columns} if column not in RESERVED else prompt.columns
    return columns.get(name) is not None


def _describe(column: str, prompts: Sequence[Prompt]) -> str:
    """A column as users write it in their data."""
    if column == SOLUTION:
        return "a column `solution` or `answer` (or a right completion)"
    if column in RESERVED and any(prompt.data.get(column) is not None for prompt in prompts):
        return f"`{column}` of a sample (the column of the data with that name is row['{DATA}']['{column}'])"
    return f"a column `{column.removeprefix(f'{DATA}.')}`"


SCORER = Functions
