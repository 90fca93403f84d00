"""A judge behind an OpenAI-compatible API: a rubric in a file, answers that are kept by content, and a cap on what it costs."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from halos import confined
from halos.config.schema import Scorer as Settings
from halos.errors import UserError
from halos.rollout.lines import line, whole_lines
from halos.rollout.servers import OverBudgetError, answers, refuse_without
from halos.rollout.types import Sample, Score, question

RUBRICS = Path(__file__).with_name("rubrics")
SCALAR, PAIRWISE = ("prompt", "completion"), ("prompt", "first", "second")
TIMEOUT = 120.0  # seconds for one answer
_OBJECT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    cost: float
    finish: str


class Judge:
    """Asks each question once, for ever: answers are kept in a file of lines by the hash of all that was asked."""

    def __init__(self, settings: Settings, cache: Path) -> None:
        """`cache` is the file of answers. Raises UserError for a rubric without a place to fill, or a missing key or package."""
        self.settings, self.pairwise, self.cache = settings, settings.pairwise, cache
        places = PAIRWISE if self.pairwise else SCALAR
        path = Path(settings.rubric or RUBRICS / ("pairwise.txt" if self.pairwise else "scalar.txt"))
        try:
            self.rubric = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"online.scorer.rubric={path} cannot be read: {error}") from error
        if missing := [place for place in places if "{" + place + "}" not in self.rubric]:
            raise UserError(f"online.scorer.rubric={path} has no {{{missing[0]}}}, where that is to be put")
        refuse_without("a judge")
        self.kept: dict[str, Answer] = {}
        self.asked = 0  # requests that this and earlier starts have sent
        self.spent = 0.0
        self._sent: set[str] = set()
        self._take_up()

    def name(self) -> str:
        return f"judge {self.settings.model}"

    def request(self) -> dict[str, Any]:
        rubric = hashlib.sha256(self.rubric.encode()).hexdigest()[:16]
        return {"judge": self.settings.model, "rubric": rubric, "pairwise": self.pairwise}

    # --- what was asked before -----------------------------------------------------------------------------------------

    def _take_up(self) -> None:
        if not self.cache.is_file():
            return
        for row in whole_lines(self.cache):
            cost = row.get("cost", 0.0)
            if not isinstance(row.get("key"), str) or not isinstance(cost, (int, float)):
                raise UserError(f"{self.cache} holds a line that is no answer: take it out, or move the file away")
            if "text" in row:
                self.kept[row["key"]] = Answer(str(row["text"]), cost, str(row.get("finish")))
                self.spent += cost
            else:
                self.asked += 1
                self._sent.add(row["key"])
        if lost := self._sent - self.kept.keys():
            tqdm.write(f"judge: {len(lost)} requests were under way when it was stopped; they are sent again with the same"
                       " idempotency key", file=sys.stderr)  # fmt: skip

    def _note(self, row: Mapping[str, Any]) -> None:
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        confined.append(self.cache, line(row), sync=True)

    # --- asking ----------------------------------------------------------------------------------------------------------

    def score(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Score]]:
        """Of a scalar rubric. Raises UserError when the budget is used up or the server refuses: what was answered is kept."""
        texts = [self._fill(prompt=question(each.prompt.turns), completion=each.text) for each in samples]
        for number, answer in self._answers(texts):
            yield samples[number], read_score(answer)

    def compare(self, pairs: Sequence[tuple[Sample, Sample]]) -> Iterator[tuple[int, str | None, Answer]]:
        """Of a pairwise rubric: the pair's number, and `A`, `B`, `tie`, or None where the answer says none of them."""
        texts = [self._fill(prompt=question(a.prompt.turns), first=a.text, second=b.text) for a, b in pairs]
        for number, answer in self._answers(texts):
            yield number, read_preference(answer), answer

    def _fill(self, **parts: str) -> str:
        """The rubric with its places filled, in one pass: what is put in is not looked at for places."""
        names = "|".join(parts)
        return re.sub(r"\{(" + names + r")\}", lambda found: parts[found[1]], self.rubric)

    def _answers(self, texts: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        """The kept ones first, then the others as they come."""
        keys = [hashlib.sha256(json.dumps([self.settings.model, text]).encode()).hexdigest() for text in texts]
        fresh: dict[str, list[int]] = {}
        for number, key in enumerate(keys):
            if key in self.kept:
                yield number, self.kept[key]
            else:
                fresh.setdefault(key, []).append(number)
        if not fresh:
            return
        asked = [(key, texts[numbers[0]]) for key, numbers in fresh.items()]
        left = len(asked)
        try:
            coming = answers(asked, self._ask, url=self.settings.url, concurrency=self.settings.concurrency, timeout=TIMEOUT)
            with closing(coming), tqdm(total=left, desc="judging", unit="answer", delay=1, disable=None) as bar:
                for key in coming:
                    left -= 1
                    bar.update()
                    for number in fresh[key]:
                        yield number, self.kept[key]
        except OverBudgetError as error:
            raise UserError(
                f"judge: {error}; {left} of {len(asked)} answers are still to come. What was paid for is kept: raise the cap, and"
                " give the same command again"
            ) from error

    def _within_budget(self) -> None:
        most, dollars = self.settings.max_requests, self.settings.max_cost
        if most is not None and self.asked >= most:
            raise OverBudgetError(f"the cap online.scorer.max_requests={most} is reached")
        if dollars is not None and self.spent >= dollars:
            raise OverBudgetError(f"the cap online.scorer.max_cost={dollars:g} is reached, {self.spent:.4f} dollars")

    async def _ask(self, client: Any, asked: tuple[str, str]) -> str:
        """Keep the answer to a text under its key."""
        self._within_budget()
        key, text = asked
        self.asked += 1
        self._note({"key": key})
        try:
            response = await client.chat.completions.create(
                model=self.settings.model, messages=[{"role": "user", "content": text}], temperature=0,
                response_format={"type": "json_object"}, extra_headers={"Idempotency-Key": key},
            )  # fmt: skip
            choice = response.choices[0] if response.choices else None
            answer = Answer((choice.message.content or "") if choice else "", self._cost(response.usage),
                            str(choice.finish_reason) if choice else "empty")  # fmt: skip
        except (ValueError, AttributeError, TypeError, IndexError) as error:
            # the server said something that is no answer: it may have been paid for, and is not asked again
            answer = Answer("", 0.0, f"broken: {type(error).__name__}")
        self.kept[key] = answer
        self.spent += answer.cost
        self._note({"key": key, "text": answer.text, "cost": answer.cost, "finish": answer.finish})
        return key

    def _cost(self, usage: Any) -> float:
        if usage is None:
            return 0.0
        return (usage.prompt_tokens * self.settings.price_in + usage.completion_tokens * self.settings.price_out) / 1e6


def read_score(answer: Answer) -> Score:
    """A number under `score`, or none: nothing is guessed."""
    parsed = _read(answer.text)
    value = parsed.get("score") if parsed else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10:
        return Score(None, f"the judge gave no score from 0 to 10 ({_said(answer)})", answer.cost)
    return Score(float(value), cost=answer.cost)


def read_preference(answer: Answer) -> str | None:
    parsed = _read(answer.text)
    value = parsed.get("better") if parsed else None
    return value if value in ("A", "B", "tie") else None


def _read(text: str) -> dict[str, Any] | None:
    """The one JSON object of an answer, which may stand in a code fence."""
    objects = _OBJECT.findall(text)
    if len(objects) != 1:
        return None
    try:
        parsed = json.loads(objects[0])
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _said(answer: Answer) -> str:
    return f"{answer.finish}: {answer.text[:80]!r}"
