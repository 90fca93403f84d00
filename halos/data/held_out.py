"""Hold rows of the training data out for evaluation, by a hash of their prompts: the same and similar prompts are on one side."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import IntEnum

from halos.data.formats import parse
from halos.data.messages import SYSTEM
from halos.data.near_duplicates import NearDuplicates
from halos.data.row import HELD_OUT, Row, depth_limited
from halos.data.sources import OpenSource
from halos.errors import UserError
from halos.examples import TEXT, Example

IRRELEVANT = {"path", "weight", "count", "epochs", "name"}  # to what the rows of an entry are, besides its content
NEAR_TRAINED = "near duplicates of earlier prompts, which are trained on"
NEAR_HELD_OUT = f"{HELD_OUT}, as near duplicates of earlier prompts that are"
NEAR_BOTH = "with prompts near those of both training and held-out rows"


class Side(IntEnum):
    """Where a row is, and why."""

    TRAIN, EVAL, TRAIN_AS_NEAR, EVAL_AS_NEAR, NEITHER = range(5)


@dataclass(frozen=True, slots=True)
class Rule:
    """How prompts are held out: a share of them, by their hash. Those whose similarity (Jaccard, of three words in a row) is at
    least `similarity` are kept on one side; None: only equal ones are."""

    fraction: float
    similarity: float | None


def prompt_text(example: Example) -> str:
    """Return the words of a prompt, in lower case and with single blanks, without system turns, which many rows share; of text
    without a prompt, the text."""
    turns = [turn for turn in example.prompt if turn["role"] not in SYSTEM]
    turns = turns or [turn for turn in example.completions[0] if turn["role"] == TEXT]
    return " ".join("\n".join(str(turn.get("content") or "") for turn in turns).casefold().split())


class Sides:
    """Assigns prompts to sides, in the order of the data. A prompt's hash alone decides, unless one before it is similar: then it
    is where that is, and nowhere where such prompts are on both sides. So rows that are added at the end move none."""

    def __init__(self, rule: Rule) -> None:
        self._rule, self._known = rule, dict[bytes, Side]()
        self._near = None if rule.similarity is None else NearDuplicates(rule.similarity)

    def side(self, text: str) -> Side:
        """Return the side of a prompt, as `prompt_text` gives it."""
        key = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
        if key not in self._known:
            held_out = int.from_bytes(key[:8]) < self._rule.fraction * 2**64
            self._known[key] = self._of_new(text, Side.EVAL if held_out else Side.TRAIN)
        return self._known[key]

    def _of_new(self, text: str, own: Side) -> Side:
        if self._near is None:
            return own
        described = self._near.describe(text)
        near = [self._near.has_similar(described, side) for side in (Side.TRAIN, Side.EVAL)]
        if all(near):
            return Side.NEITHER
        side = own if not any(near) else Side(near.index(True))
        self._near.add(described, int(side))
        return side if side == own else Side(side + 2)


def divided(opened: Sequence[OpenSource], rule: Rule, *, score: str, held_out: bool) -> list[OpenSource]:
    """Return the sources without the rows that are held out, which are counted, or with those alone."""
    entries = [{name: value for name, value in asdict(each.source).items() if name not in IRRELEVANT} for each in opened]
    parts = [rule.fraction, rule.similarity, score, [each.fingerprint for each in opened], entries]
    key = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def part(number: int) -> OpenSource:
        each, rows = opened[number], _held_out if held_out else _trained_on
        fingerprint = f"{each.fingerprint} {'held out' if held_out else 'trained on'} {number} {key}"
        plain = replace(each.source, weight=None, count=None, epochs=None) if held_out else each.source
        return replace(each, source=plain, fingerprint=fingerprint, may_be_empty=held_out,
                       rows=lambda: rows(each, _sides(key, opened, rule, score)[number]))  # fmt: skip

    return [part(number) for number in range(len(opened))]


_last: dict[str, list[bytes]] = {}  # training and evaluation need the same


def _sides(key: str, opened: Sequence[OpenSource], rule: Rule, score: str) -> list[bytes]:
    """Return the side of each row of each source, a byte each."""
    if key not in _last:
        sides = Sides(rule)
        found = [bytes(_side_of(row, sides, score) for row in each.rows()) for each in opened]
        _last.clear()
        _last[key] = found
    return _last[key]


def _side_of(row: Row, sides: Sides, score: str) -> Side:
    if row.left_out:
        return Side.TRAIN
    with depth_limited(row.where):
        example = parse(row, score=score).example
        return Side.TRAIN if example is None else sides.side(prompt_text(example))


_IN_TRAINING = {Side.EVAL: HELD_OUT, Side.EVAL_AS_NEAR: NEAR_HELD_OUT, Side.NEITHER: NEAR_BOTH}


def _trained_on(source: OpenSource, sides: bytes) -> Iterator[Row]:
    for row, side in _together(source, sides):
        if side in _IN_TRAINING:
            yield row._replace(left_out=True, note=_IN_TRAINING[Side(side)])
        else:
            yield row._replace(note=NEAR_TRAINED) if side == Side.TRAIN_AS_NEAR else row


def _held_out(source: OpenSource, sides: bytes) -> Iterator[Row]:
    return (row for row, side in _together(source, sides) if side in (Side.EVAL, Side.EVAL_AS_NEAR))


def _together(source: OpenSource, sides: bytes) -> Iterator[tuple[Row, int]]:
    try:
        yield from zip(source.rows(), sides, strict=True)
    except ValueError as error:
        raise UserError(f"{source.source.path}: has other rows than when it was read first: start again") from error
