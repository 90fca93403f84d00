"""What flows from a prompt to a reward: Prompt -> Request -> Sample -> Score; each as a file has it, and as code sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from halos.errors import UserError

Row = dict[str, Any]  # a line of a file
Key = tuple[str, int]  # of a sample: its prompt's id, and its number among that prompt's samples
Turns = tuple[Mapping[str, Any], ...]  # as halos.types has them, without what that imports
TRAIN, EVAL = "train", "eval"  # what a prompt is for

# Of a sample's line, and of its score; all else in a line are columns of the data
_OF_SAMPLE = ("type", "prompt_id", "sample_id", "prompt", "split", "output", "finish", "tokens", "seed", "temperature",
              "generator", "output_ids", "logps", "vocabulary", "generator_sha256")  # fmt: skip
_OF_SCORE = ("reward", "labeller", "cost", "problem", "parts", "verdict")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked, and what the data says of it."""

    id: str
    turns: Turns
    split: str | None = None  # train | eval; None before that is decided
    samples: int | None = None  # its own number, in the place of everybody's
    temperature: float | None = None  # its own; 0: the likeliest token each time
    columns: Mapping[str, Any] = field(default_factory=dict)  # of its row in the data, as reward functions see them: `solution`
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32), compare=False, repr=False)
    """Its tokens as an engine is fed them, the template's generation prompt included; in no file."""

    @property
    def is_held_out(self) -> bool:
        return self.split == EVAL

    def to_row(self) -> Row:
        own = {"samples": self.samples, "temperature": self.temperature, "split": self.split}
        return {"type": "prompt", "prompt_id": self.id, "prompt": list(self.turns), **self.columns, **_known(own)}


@dataclass(frozen=True, slots=True)
class Request:
    """One completion of one prompt. The same request gives the same text (of one engine, on one kind of hardware)."""

    prompt: Prompt
    number: int
    ids: tuple[int, ...]  # the prompt's tokens
    seed: int
    temperature: float  # 0: the likeliest token each time
    max_new_tokens: int

    @property
    def key(self) -> Key:
        return self.prompt.id, self.number

    def uniforms(self) -> np.ndarray:
        """One number in (0, 1) for each token that may come: (max_new_tokens,) float64, the same in every numpy."""
        bits = np.random.Philox(np.random.SeedSequence(self.seed)).random_raw(self.max_new_tokens)
        return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose samples they are."""

    generator: str  # the policy's name
    vocabulary: str | None = None  # of the tokenizer that the ids are of


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion, as an engine gave it or a file has it; None is what files of other tools do not say.

    `ids` and `logps` (of the softmax at the request's temperature, before top_p and top_k) are empty for engines that speak
    text; the end token is among them where it was sampled.
    """

    prompt: Prompt
    number: int
    output: str | Turns  # text, or messages
    finish: str | None = None  # stop | length
    tokens: int | None = None  # sampled, as the engine counts them
    seed: int | None = None
    temperature: float | None = None
    ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    generator: str | None = None
    vocabulary: str | None = None
    weights: str | None = None  # the hash of those that it was sampled from

    @classmethod
    def of(
        cls, request: Request, origin: Origin, text: str, *, finish: str, tokens: int, ids: Sequence[int] = (),
        logps: Iterable[float] = (),
    ) -> Sample:  # fmt: skip
        """What an engine answers. Log-probs have the seven digits of the files, so that a file read back is what was sampled."""
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
        said = {"finish": self.finish, "tokens": self.tokens, "seed": self.seed, "temperature": self.temperature,
                "generator": self.generator}  # fmt: skip
        return {**about, **self.prompt.columns, **_known(split), "output": output, **_known(said), **self.token_row()}

    def token_row(self) -> Row:
        """What only engines that know tokens say; other tools may know them without their log-probs."""
        ids, logps = list(self.ids) or None, list(self.logps) or None
        return _known({"output_ids": ids, "logps": logps, "vocabulary": self.vocabulary})

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Sample:
        """A line of ours or of HALOs, whose AlpacaEval mode has an `instruction` for a `prompt`. One without a sample_id is
        number -1. Raises UserError, with `where` the line stands, for what is no sample."""
        if "output" not in row or ("prompt" not in row and "instruction" not in row) or "prompt_id" not in row:
            has = ", ".join(row) or "none"
            raise UserError(f"{where}: a sample has prompt_id, prompt (or instruction) and output; this row has {has}")
        asked, output = row["prompt"] if "prompt" in row else row["instruction"], row["output"]
        asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        for name, value in (("prompt", asked), ("output", [] if isinstance(output, str) else output)):
            if not isinstance(value, list) or not all(isinstance(turn, dict) and "role" in turn for turn in value):
                raise UserError(f"{where}: {name} is {str(row.get(name))[:60]!r}; it takes text or a list of messages")
        number = row.get("sample_id")
        if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise UserError(f"{where}: sample_id is {number!r}, not a whole number")
        columns = {name: value for name, value in row.items() if name not in _OF_SAMPLE}
        prompt = Prompt(str(row["prompt_id"]), tuple(asked), row.get("split"), columns=columns)
        return cls(
            prompt, -1 if number is None else number, output if isinstance(output, str) else tuple(output), row.get("finish"),
            row.get("tokens"), row.get("seed"), row.get("temperature"), tuple(row.get("output_ids") or ()),
            tuple(row.get("logps") or ()), row.get("generator"), row.get("vocabulary"), row.get("generator_sha256"),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Score:
    """What a scorer makes of a sample; `value` is None where there is no score, and `problem` says why."""

    value: float | None
    problem: str = ""
    cost: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)  # of a composition, by function
    scorer: str | None = None  # its name
    verdict: str | None = None  # of a judge that compares: preferred | not preferred | tie
    lacking: tuple[str, ...] = ()  # columns that a function asked for and the sample does not have, where it raised

    def to_row(self) -> Row:
        own = {"labeller": self.scorer, "cost": self.cost} if self.scorer is not None else {}
        more = {"problem": self.problem or None, "parts": dict(self.parts) or None, "verdict": self.verdict}
        return {"reward": self.value, **own, **_known(more)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Score:
        return cls(row.get("reward"), row.get("problem") or "", row.get("cost") or 0.0, row.get("parts") or {},
                   row.get("labeller"), row.get("verdict"))  # fmt: skip


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
        """Of one that has a score."""
        assert self.score.value is not None
        return self.score.value

    def shown(self) -> Row:
        """For people and hooks: `prompt`, `output`, `reward`, `split` and all else that is known."""
        return {**self.sample.to_row(), **self.score.to_row()}

    def to_row(self) -> Row:
        score = self.score.to_row()
        weights = _known({"generator_sha256": self.sample.weights})
        first = {name: score.pop(name) for name in ("reward", "labeller", "cost") if name in score}
        return {**self.sample.to_row(), "type": "scalar_feedback", "output": self.sample.messages, **first, **weights, **score}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Rollout:
        sample = {name: value for name, value in row.items() if name not in _OF_SCORE}
        return cls(Sample.from_row(sample, where), Score.from_row(row))


def seed_of(seed: int, prompt_id: str, sample_id: int) -> int:
    """A request's own: 63 bits."""
    text = f"{seed}/{prompt_id}/{sample_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def requests_for(prompts: Iterable[Prompt], *, samples: int, temperature: float, max_new_tokens: int, seed: int) -> list[Request]:
    """Every sample of every prompt, in order. A prompt's own `samples` and `temperature` come first."""
    return [
        Request(
            prompt, number, ids, seed_of(seed, prompt.id, number),
            float(temperature if prompt.temperature is None else prompt.temperature), max_new_tokens,
        )
        for prompt in prompts
        for ids in [tuple(map(int, prompt.ids))]
        for number in range(samples if prompt.samples is None else prompt.samples)
    ]  # fmt: skip


def by_prompt(rollouts: Iterable[Rollout]) -> list[list[Rollout]]:
    """Samples of one prompt together, in the order of the prompts."""
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt.id, []).append(rollout)
    return list(groups.values())


def numbered(samples: Iterable[tuple[Sample, str]]) -> Iterator[Sample]:
    """Samples with a number each, those that have none in their order; raises UserError, with where it stands, for a second
    sample of one number."""
    taken: dict[str, set[int]] = {}
    for sample, where in samples:
        others = taken.setdefault(sample.prompt.id, set())
        own = len(others) if sample.number < 0 else sample.number
        if own in others:
            raise UserError(f"{where}: there is a sample {own} of prompt {sample.prompt.id!r} already")
        others.add(own)
        yield replace(sample, number=own)


def text_of(output: Any) -> str:
    """A completion as text, whether a record has it as text or as messages."""
    if isinstance(output, str):
        return output
    return "\n".join(str(turn.get("content") or "") for turn in output or ())


def question(turns: Sequence[Mapping[str, Any]]) -> str:
    """A prompt as text, for people and rubrics: one turn as it is, several with their roles."""
    if len(turns) == 1:
        return str(turns[0].get("content") or "")
    return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in turns)


def _known(row: Row) -> Row:
    return {name: value for name, value in row.items() if value is not None}
