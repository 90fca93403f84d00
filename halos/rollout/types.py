"""The data types of sampling, Prompt -> Request -> Sample -> Score, and their rows in files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from halos.errors import UserError
from halos.redaction import redact
from halos.rollout.rows import DATA, OF_SAMPLE, OF_SCORE, Row, check_types

Key = tuple[str, int]  # identifies a sample: its prompt's id, and its number among the samples of that prompt
Turns = tuple[Mapping[str, Any], ...]  # as in halos.types, which imports torch
TRAIN, EVAL = "train", "eval"  # splits of prompts


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with its row in the data.

    `columns` stand in files beside the keys of a sample: `solution`, the answer as text, and what samples of other tools have.
    `data` is the row of the data, whole, with the types that JSON has; in files it is one key, so that no column of the data can
    be taken for a key of a sample.
    """

    id: str
    turns: Turns
    split: str | None = None  # train | eval; None until that is decided
    samples: int | None = None  # overrides the common number of samples
    temperature: float | None = None  # overrides the common temperature; 0: greedy
    seed: int | None = None  # overrides the common seed
    columns: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32), compare=False, repr=False)
    """Token ids for the engine, the template's generation prompt included; not written to files."""

    @property
    def is_eval(self) -> bool:
        return self.split == EVAL

    @property
    def data_row(self) -> Row:
        """The data as a key of a row; nothing where there are none, as in files of older versions and of other tools."""
        return {DATA: dict(self.data)} if self.data else {}

    def to_row(self) -> Row:
        own = {"samples": self.samples, "temperature": self.temperature, "seed": self.seed, "split": self.split}
        about = {"type": "prompt", "prompt_id": self.id, "prompt": list(self.turns)}
        return {**about, **self.columns, **self.data_row, **_without_none(own)}


@dataclass(frozen=True, slots=True)
class Request:
    """A request for one completion of one prompt. The same request gives the same text (on one engine and kind of hardware)."""

    prompt: Prompt
    number: int
    ids: tuple[int, ...]  # the prompt's tokens
    seed: int
    temperature: float  # 0: greedy
    max_new_tokens: int

    @property
    def key(self) -> Key:
        return self.prompt.id, self.number

    def uniforms(self) -> np.ndarray:
        """A random number in (0, 1) for each possible token: (max_new_tokens,) float64, the same in every version of numpy."""
        bits = np.random.Philox(np.random.SeedSequence(self.seed)).random_raw(self.max_new_tokens)
        return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Origin:
    """The policy that samples come from."""

    generator: str  # its name
    vocabulary: str | None = None  # identifies the tokenizer of the sampled ids


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion from an engine or a file; None stands for what files of other tools do not have.

    `ids` and `logps` (of the softmax at the request's temperature, before top_p and top_k) are empty for engines that return
    text alone; they include the end token where it was sampled.
    """

    prompt: Prompt
    number: int
    output: str | Turns  # text, or messages
    finish: str | None = None  # stop | length
    tokens: int | None = None  # number of sampled tokens, as counted by the engine
    seed: int | None = None
    temperature: float | None = None
    ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    generator: str | None = None
    vocabulary: str | None = None
    weights: str | None = None  # hash of the weights that it was sampled from

    @classmethod
    def of(
        cls, request: Request, origin: Origin, text: str, *, finish: str, tokens: int, ids: Sequence[int] = (),
        logps: Iterable[float] = (),
    ) -> Sample:  # fmt: skip
        """An engine's answer to a request. Log-probs are rounded to the 7 digits of the files, so that files read back equal."""
        return cls(
            request.prompt, request.number, text, finish, tokens, request.seed, request.temperature, tuple(ids),
            tuple(round(logp, 7) for logp in logps), origin.generator, origin.vocabulary if ids else None,
        )  # fmt: skip

    @property
    def key(self) -> Key:
        return self.prompt.id, self.number

    @property
    def text(self) -> str:
        return text_of(self.output)

    @property
    def messages(self) -> list[Mapping[str, Any]]:
        return [{"role": "assistant", "content": self.output}] if isinstance(self.output, str) else list(self.output)

    def to_row(self) -> Row:
        about = {"type": "sample", "prompt_id": self.prompt.id, "sample_id": self.number, "prompt": list(self.prompt.turns)}
        split = {"split": self.prompt.split}
        output = self.output if isinstance(self.output, str) else list(self.output)
        facts = {"finish": self.finish, "tokens": self.tokens, "seed": self.seed, "temperature": self.temperature,
                "generator": self.generator}  # fmt: skip
        split, facts = _without_none(split), _without_none(facts)
        return {**about, **self.prompt.columns, **self.prompt.data_row, **split, "output": output, **facts, **self.token_row()}

    def token_row(self) -> Row:
        """Token ids and log-probs, where known; other tools may have ids without log-probs."""
        return _without_none({"output_ids": [*self.ids] or None, "logps": [*self.logps] or None, "vocabulary": self.vocabulary})

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Sample:
        """A row of our files or of HALOs', whose AlpacaEval mode has an `instruction` for a `prompt`. Without a sample_id the
        number is -1. Raises UserError, naming `where` the row is, for a row that is no sample."""
        if "output" not in row or ("prompt" not in row and "instruction" not in row) or "prompt_id" not in row:
            has = ", ".join(row) or "none"
            raise UserError(f"{where}: a sample has prompt_id, prompt (or instruction) and output; this row has {has}")
        turns, output = row["prompt"] if "prompt" in row else row["instruction"], row["output"]
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
        for name, value in (("prompt", turns), ("output", [] if isinstance(output, str) else output)):
            if not isinstance(value, list) or not all(isinstance(turn, dict) and "role" in turn for turn in value):
                raise UserError(f"{where}: {name} is {str(row.get(name))[:60]!r}; it takes text or a list of messages")
        check_types(row, where)
        number, whole = row.get("sample_id"), isinstance(row.get(DATA), dict)
        data = {**{name: row[name] for name in OF_SCORE if name in row}, **(row[DATA] if whole else {})}
        columns = {name: row[name] for name in row if name not in (*OF_SAMPLE, *OF_SCORE) and not (whole and name == DATA)}
        prompt = Prompt(str(row["prompt_id"]), tuple(turns), row.get("split"), columns=columns, data=data)
        return cls(
            prompt, -1 if number is None else number, output if isinstance(output, str) else tuple(output), row.get("finish"),
            row.get("tokens"), row.get("seed"), row.get("temperature"), tuple(row.get("output_ids") or ()),
            tuple(row.get("logps") or ()), row.get("generator"), row.get("vocabulary"), row.get("generator_sha256"),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Score:
    """A scorer's score of a sample. Where there is none, `value` is None and `problem` says why."""

    value: float | None
    problem: str = ""
    cost: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)  # by function that applies, where several are added up
    scorer: str | None = None  # its name
    verdict: str | None = None  # of a judge that compares: preferred | not preferred | tie
    lacking: tuple[str, ...] = ()  # columns that a function read but the sample does not have, where it raised
    normalised: float | None = None  # learned from instead of `value`, with online.scorer.aggregation=normalised

    def to_row(self) -> Row:
        own = {"labeller": self.scorer, "cost": self.cost} if self.scorer is not None else {}
        more = {"problem": redact(self.problem) or None, "parts": dict(self.parts) or None, "normalised": self.normalised,
                "verdict": self.verdict}  # fmt: skip
        return {"reward": self.value, **own, **_without_none(more)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Score:
        return cls(row.get("reward"), row.get("problem") or "", row.get("cost") or 0.0, row.get("parts") or {},
                   row.get("labeller"), row.get("verdict"), normalised=row.get("normalised"))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sample with its score."""

    sample: Sample
    score: Score

    @property
    def key(self) -> Key:
        return self.sample.key

    @property
    def prompt(self) -> Prompt:
        return self.sample.prompt

    @property
    def reward(self) -> float:
        """The score, which must not be None."""
        assert self.score.value is not None
        return self.score.value

    @property
    def learned(self) -> Rollout:
        """The rollout as losses learn from it: with the normalised reward where there is one."""
        normalised = self.score.normalised
        return self if normalised is None else replace(self, score=replace(self.score, value=normalised))

    def shown(self) -> Row:
        """A row for people and hooks: `prompt`, `output`, `reward`, `split` and everything else that is known."""
        return {**self.sample.to_row(), **self.score.to_row()}

    def to_row(self) -> Row:
        """A row of scores: without the data, which can be large and stand with the samples."""
        score, sample = self.score.to_row(), replace(self.sample, prompt=replace(self.prompt, data={}))
        weights = _without_none({"generator_sha256": self.sample.weights})
        first = {name: score.pop(name) for name in ("reward", "labeller", "cost") if name in score}
        return {**sample.to_row(), "type": "scalar_feedback", "output": self.sample.messages, **first, **weights, **score}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Rollout:
        sample = {name: value for name, value in row.items() if name not in OF_SCORE}
        return cls(Sample.from_row(sample, where), Score.from_row(row))


def seed_of(seed: int, prompt_id: str, sample_id: int) -> int:
    """The seed of one request: 63 bits."""
    text = f"{seed}/{prompt_id}/{sample_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def requests_for(
    prompts: Iterable[Prompt], *, samples: int, temperature: float, max_new_tokens: int | None, seed: int,
    max_length: float = math.inf,
) -> list[Request]:  # fmt: skip
    """Requests for every sample of every prompt, in order. A prompt's own settings take precedence. Without `max_new_tokens` a
    completion may have as many tokens as its prompt leaves of `max_length`."""
    assert max_new_tokens is not None or max_length < math.inf
    return [
        Request(
            prompt, number, ids, seed_of(seed if prompt.seed is None else prompt.seed, prompt.id, number),
            float(temperature if prompt.temperature is None else prompt.temperature),
            int(max_length) - len(ids) if max_new_tokens is None else max_new_tokens,
        )
        for prompt in prompts
        for ids in [tuple(map(int, prompt.ids))]
        for number in range(samples if prompt.samples is None else prompt.samples)
    ]  # fmt: skip


def by_prompt(rollouts: Iterable[Rollout]) -> list[list[Rollout]]:
    """Rollouts grouped by prompt, in the order of the prompts."""
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt.id, []).append(rollout)
    return list(groups.values())


def numbered(samples: Iterable[tuple[Sample, str]]) -> Iterator[Sample]:
    """Number the samples that have no number, in their order. Raises UserError, naming where it is, for a second prompt with
    one id, and for a second sample with one number."""
    taken: dict[str, tuple[Turns, str, set[int]]] = {}
    for sample, where in samples:
        turns, first, others = taken.setdefault(sample.prompt.id, (sample.prompt.turns, where, set()))
        if sample.prompt.turns != turns:
            raise UserError(f"{where}: another prompt, at {first}, has the prompt_id {sample.prompt.id!r} too: give each its own")
        own = len(others) if sample.number < 0 else sample.number
        if own in others:
            raise UserError(f"{where}: there is a sample {own} of prompt {sample.prompt.id!r} already")
        others.add(own)
        yield replace(sample, number=own)


def text_of(output: Any) -> str:
    """A completion as text, given as text or as messages."""
    if isinstance(output, str):
        return output
    return "\n".join(str(turn.get("content") or "") for turn in output or ())


def question(turns: Sequence[Mapping[str, Any]]) -> str:
    """A prompt as text, for people and rubrics: a single turn's content, or several turns with their roles."""
    if len(turns) == 1:
        return str(turns[0].get("content") or "")
    return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in turns)


def _without_none(row: Row) -> Row:
    return {name: value for name, value in row.items() if value is not None}
