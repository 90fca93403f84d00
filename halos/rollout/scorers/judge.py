"""An LLM judge behind an OpenAI-compatible API: its rubric is a file, its answers are cached by content, its cost is capped."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from halos import confined
from halos.config.schema import Scorer as Settings
from halos.errors import UserError
from halos.redaction import redact
from halos.rollout.jsonl import complete_lines, to_line
from halos.rollout.scorers.scorer import Context, Option, PairwiseScorer, Verdict
from halos.rollout.servers import OverBudgetError, answers, refuse_unreachable, require_client
from halos.rollout.types import Sample, Score, question

RUBRICS = Path(__file__).with_name("rubrics")
SCALAR, PAIRWISE = ("prompt", "completion"), ("prompt", "first", "second")
TIMEOUT = 120.0  # seconds for one answer
_BRACE = re.compile(r"[{}]")


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    cost: float
    finish: str


class Judge(PairwiseScorer):
    """Asks each question only once, across runs: answers are cached in a JSON lines file under a hash of model and question."""

    option = Option("--judge", "a model behind an OpenAI-compatible API; its key is OPENAI_API_KEY", key="model", metavar="MODEL")
    is_paid = True
    takes = (
        "model", "url", "pairwise", "rubric", "concurrency", "max_requests", "max_cost", "price_in", "price_out"
    )  # fmt: skip
    paths = ("rubric",)
    addresses = ("url",)

    @classmethod
    def problem(cls, settings: Settings, spelled: Callable[[str], str]) -> str | None:
        if not settings.model:
            return f"{spelled('model')} is missing: the judge's name at its API"
        if settings.max_cost is not None and not settings.price_in and not settings.price_out:
            return (
                f"{spelled('max_cost')}={settings.max_cost:g} would never act, because both prices are 0: give"
                f" {spelled('price_in')} and {spelled('price_out')}, in dollars per million tokens, or cap the number of requests"
                f" with {spelled('max_requests')}"
            )
        return None

    @classmethod
    def open(cls, settings: Settings, context: Context) -> Judge:
        return cls(settings, context.answers)

    def __init__(self, settings: Settings, cache: Path) -> None:
        """`cache` is the file of answers. Raises UserError for a rubric that lacks a placeholder, or a missing key or package."""
        self.settings, self.pairwise, self.cache = settings, settings.pairwise, cache
        placeholders = PAIRWISE if self.pairwise else SCALAR
        path = Path(settings.rubric or RUBRICS / ("pairwise.txt" if self.pairwise else "scalar.txt"))
        try:
            self.rubric = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"online.scorer.rubric={path} cannot be read: {error}") from error
        if missing := [name for name in placeholders if "{" + name + "}" not in self.rubric]:
            raise UserError(f"online.scorer.rubric={path} has no placeholder {{{missing[0]}}}")
        require_client("a judge")
        self.cached: dict[str, Answer] = {}
        self.num_requests = 0  # sent by this and earlier attempts
        self.spent = 0.0  # dollars
        self._largest: float | None = None  # cost of an answer so far; None: no answer has one
        self._in_flight, self._reserved = 0, 0.0
        self._is_priced = True  # until an answer comes without its number of tokens
        self._sent: set[str] = set()
        for path in (self.cache, *sorted(self.cache.parent.glob(f"{self.cache.stem}.[0-9]*.jsonl"))):
            self._load_cache(path)  # the others are of an older version, in which every process had a file
        if lost := self._sent - self.cached.keys():
            tqdm.write(f"judge: {len(lost)} requests were in flight when it was stopped; they are sent again with the same"
                       " idempotency key", file=sys.stderr)  # fmt: skip

    def check_ready(self) -> None:
        if self.settings.url is not None:
            refuse_unreachable(self.settings.url, "online.scorer.url")

    def name(self) -> str:
        return f"judge {self.settings.model}"

    def request(self) -> dict[str, Any]:
        rubric = hashlib.sha256(self.rubric.encode()).hexdigest()[:16]
        return {"judge": self.settings.model, "rubric": rubric, "pairwise": self.pairwise}

    # --- the cache of answers -------------------------------------------------------------------------------------------

    def _load_cache(self, path: Path) -> None:
        if not path.is_file():
            return
        for row in complete_lines(path):
            cost = row.get("cost", 0.0)
            if not isinstance(row.get("key"), str) or not isinstance(cost, (int, float)):
                raise UserError(f"{path} holds a line that is no answer: take it out, or move the file away")
            if "text" in row:
                self.cached[row["key"]] = Answer(str(row["text"]), cost, str(row.get("finish")))
                self._pay(cost)
            else:
                self.num_requests += 1
                self._sent.add(row["key"])

    def _pay(self, cost: float) -> None:
        self.spent += cost
        if cost > 0:
            self._largest = max(self._largest or 0.0, cost)

    def _append(self, row: Mapping[str, Any]) -> None:
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        confined.append(self.cache, to_line(row), sync=True)

    # --- asking ----------------------------------------------------------------------------------------------------------

    def score(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Score]]:
        """Scores from a scalar rubric. Raises UserError when a cap is reached or the server refuses; answers so far are kept."""
        texts = [self._fill(prompt=question(each.prompt.turns), completion=each.text) for each in samples]
        for number, answer in self._answers(texts):
            yield samples[number], read_score(answer)

    def compare(self, pairs: Sequence[tuple[Sample, Sample]]) -> Iterator[tuple[int, Verdict]]:
        """Verdicts from a pairwise rubric."""
        texts = [self._fill(prompt=question(a.prompt.turns), first=a.text, second=b.text) for a, b in pairs]
        for number, answer in self._answers(texts):
            yield number, Verdict(read_preference(answer), answer.text, answer.finish, answer.cost)

    def _fill(self, **parts: str) -> str:
        """The rubric with its placeholders filled in one pass: placeholders inside the inserted texts stay."""
        names = "|".join(parts)
        return re.sub(r"\{(" + names + r")\}", lambda match: parts[match[1]], self.rubric)

    def _answers(self, texts: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        """Yield cached answers first, then the others as they come."""
        keys = [hashlib.sha256(json.dumps([self.settings.model, text]).encode()).hexdigest() for text in texts]
        fresh: dict[str, list[int]] = {}
        for number, key in enumerate(keys):
            if key in self.cached:
                yield number, self.cached[key]
            else:
                fresh.setdefault(key, []).append(number)
        if not fresh:
            return
        questions = [(key, texts[numbers[0]]) for key, numbers in fresh.items()]
        left, self._settled = len(questions), asyncio.Condition()
        try:
            url, concurrency = self.settings.url, self.settings.concurrency
            answered = answers(questions, self._ask, url=url, concurrency=concurrency, timeout=TIMEOUT)
            with closing(answered), tqdm(total=left, desc="judging", unit="answer", delay=1, disable=None) as bar:
                for key in answered:
                    left -= 1
                    bar.update()
                    for number in fresh[key]:
                        yield number, self.cached[key]
        except OverBudgetError as error:
            raise UserError(
                f"judge: {error}; {left} of {len(questions)} answers are still missing. What was paid for is kept: change the"
                " cap, and run the same command again"
            ) from error

    def _refuse_over_budget(self) -> None:
        max_requests, max_cost = self.settings.max_requests, self.settings.max_cost
        if max_requests is not None and self.num_requests >= max_requests:
            raise OverBudgetError(f"the cap online.scorer.max_requests={max_requests} is reached")
        if max_cost is not None and (self.spent >= max_cost or not self._has_room(max_cost)):
            another = f", and another answer may cost {self._largest:.4f}" if self._largest and self.spent < max_cost else ""
            raise OverBudgetError(f"the cap online.scorer.max_cost={max_cost:g} is reached, {self.spent:.4f} dollars{another}")
        if max_cost is not None and not self._is_priced:
            raise OverBudgetError(
                f"the cap online.scorer.max_cost={max_cost:g} cannot act, because the server does not say how many tokens an"
                " answer took: use online.scorer.max_requests instead"
            )

    def _has_room(self, max_cost: float) -> bool:
        """Whether the cap holds another answer as dear as the dearest so far, besides those in flight."""
        return self.spent + self._reserved + (self._largest or 0.0) <= max_cost * (1 + 1e-9)

    async def _reserve(self) -> float:
        """Reserve for a request what an answer has cost at most so far, once answers to those in flight leave room for it; until
        a first answer has a price, one is in flight. Raises OverBudgetError where a cap leaves no room."""
        max_cost = self.settings.max_cost
        async with self._settled:
            while max_cost is not None and self._in_flight and (self._largest is None or not self._has_room(max_cost)):
                await self._settled.wait()
            self._refuse_over_budget()
            reserved = self._largest or 0.0
            self.num_requests, self._in_flight, self._reserved = (
                self.num_requests + 1,
                self._in_flight + 1,
                self._reserved + reserved,
            )
        return reserved

    async def _ask(self, client: Any, question: tuple[str, str]) -> str:
        """Ask a question (key, text), cache the answer and return the key."""
        reserved = await self._reserve()
        try:
            return await self._ask_reserved(client, *question)
        finally:
            async with self._settled:
                self._in_flight, self._reserved = self._in_flight - 1, self._reserved - reserved
                self._settled.notify_all()

    async def _ask_reserved(self, client: Any, key: str, text: str) -> str:
        self._append({"key": key})
        try:
            response = await client.chat.completions.create(
                model=self.settings.model, messages=[{"role": "user", "content": text}], temperature=0,
                response_format={"type": "json_object"}, extra_headers={"Idempotency-Key": key},
            )  # fmt: skip
            choice = response.choices[0] if response.choices else None
            text = (choice.message.content or "") if choice else ""
            answer = Answer(redact(text), self._cost(response.usage),  # a server may quote the key
                            redact(str(choice.finish_reason)) if choice else "empty")  # fmt: skip
        except (ValueError, AttributeError, TypeError, IndexError) as error:
            # the response is malformed: it may have been paid for, so it is not requested again
            answer = Answer("", 0.0, f"broken: {type(error).__name__}")
        self.cached[key] = answer
        self._pay(answer.cost)
        self._append({"key": key, "text": answer.text, "cost": answer.cost, "finish": answer.finish})
        return key

    def _cost(self, usage: Any) -> float:
        if usage is None:
            self._is_priced = False
            return 0.0
        return (usage.prompt_tokens * self.settings.price_in + usage.completion_tokens * self.settings.price_out) / 1e6


def read_score(answer: Answer) -> Score:
    """The number under `score`; a score of None where there is none. Nothing is guessed."""
    parsed = _parse(answer.text)
    value = parsed.get("score") if parsed else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10:
        return Score(None, f"the judge gave no score from 0 to 10 ({_excerpt(answer)})", answer.cost)
    return Score(float(value), cost=answer.cost)


def read_preference(answer: Answer) -> str | None:
    parsed = _parse(answer.text)
    value = parsed.get("better") if parsed else None
    return value if value in ("A", "B", "tie") else None


def _parse(text: str) -> dict[str, Any] | None:
    """The only outermost JSON object in an answer, which may be in a code fence; None where there is not exactly one. Nothing is
    read within braces that are no JSON, such as those of an object that was cut."""
    objects, depth, brace = list[dict[str, Any]](), 0, _BRACE.search(text)
    while brace is not None:
        end = brace.end()
        try:
            if brace[0] == "{" and depth == 0:
                parsed, end = json.JSONDecoder().raw_decode(text, brace.start())
                objects.append(parsed)
            else:
                depth = max(depth + (1 if brace[0] == "{" else -1), 0)
        except (ValueError, RecursionError):
            depth = 1
        brace = _BRACE.search(text, end)
    return objects[0] if len(objects) == 1 else None


def _excerpt(answer: Answer) -> str:
    return f"{answer.finish}: {answer.text[:80]!r}"


SCORER = Judge
