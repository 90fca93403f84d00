"""Pairs as other data sets have them: HH's text with markers, text that begins alike, scores, UltraFeedback's completions."""

import re
from collections.abc import Mapping
from typing import Any

from halos.data.numbers import number_in
from halos.data.row import EQUAL
from halos.data.schemas.schema import PROMPTS, Change, Columns, Schema, is_pair, without
from halos.errors import UserError

EQUAL_SCORES = "whose completions have equal scores"
FEW_SCORES = "with fewer than two scored completions"
CONTRADICTING = "whose scores contradict their order"
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating"),
          ("chosen_rating", "rejected_rating"), ("rating_chosen", "rating_rejected"))  # fmt: skip
_MARK = re.compile(r"(?:^|\n\n)\s*(Human|Assistant|(?<![\s\S])System): ?")  # a system turn comes first
_MARKED = re.compile(r"\s*Human:.*\n\s*Assistant:", re.DOTALL)
ASKS = (*PROMPTS, "problem", "q")  # names of columns that ask, whatever they hold
MIN_LETTERS = 6  # of a script without blanks, in a column that may ask something
_ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}


def hh_turns(text: str) -> list[dict[str, str]] | None:
    """Return the turns of text with the markers of HH, `\\n\\nHuman: ` and `\\n\\nAssistant: `; None for other text.

    A last marker of the assistant without words, where an answer goes, is no turn.
    """
    text = text.replace("\r\n", "\n")
    if "\n\nAssistant:" not in text or not (start := text.lstrip()).startswith(("Human:", "System:")):
        return None
    parts = _MARK.split(start)[1:]
    turns = [{"role": _ROLES[mark], "content": words.strip()} for mark, words in zip(parts[::2], parts[1::2], strict=True)]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def hh(columns: Columns, where: str) -> Change | None:
    """Turn text with HH's markers into turns; answers to such a prompt lose the blank before them."""
    names = ("chosen", "rejected") if is_pair(columns) and "prompt" not in columns else ("prompt", "chosen", "rejected")
    turns = {name: found for name in names if isinstance(text := columns.get(name), str) and (found := hh_turns(text))}
    if not turns or (names[0] == "chosen" and len(turns) < 2):
        return None
    answers = {name: columns[name].strip() for name in ("chosen", "rejected", "completion") if name not in turns
               and isinstance(columns.get(name), str)} if "prompt" in turns else {}  # fmt: skip
    return Change({**columns, **answers, **turns}, read_as="HH")


def implicit_prompt(columns: Columns, where: str) -> Change | None:
    """Take what both texts of a pair begin with as their prompt, up to the last blank of it. Raises UserError where another
    column has words: it may be the prompt, and answers to one question often begin in the same way."""
    chosen, rejected = columns.get("chosen"), columns.get("rejected")
    if "prompt" in columns or not isinstance(chosen, str) or not isinstance(rejected, str):
        return None
    others = [name for name in columns if name not in ("chosen", "rejected", "system")
              and (_sentence(columns[name]) or name.lower() in ASKS)]  # fmt: skip
    if others:
        raise UserError(
            f"{where}: chosen and rejected are text, and there is no prompt: it may be {' or '.join(others)}"
            f" (data.columns={{prompt: {others[0]}}}), or how both begin (data.columns={{"
            f"{', '.join(f'{name}: null' for name in others)}}})"
        )
    if chosen == rejected:
        return Change(dict(columns), dropped=EQUAL)
    if all(_MARKED.match(text) for text in (chosen, rejected)):
        raise UserError(
            f"{where}: chosen and rejected have marks of turns (Human:, Assistant:), which are read where each is after a blank"
            " line: write such lines, or make turns of them with a function of yours (data.format)"
        )
    most = min(len(chosen), len(rejected))
    same = next((n for n in range(most) if chosen[n] != rejected[n]), most)
    blank = re.search(r"\s\S*\Z", chosen[:same])
    if blank is None or not chosen[: blank.start()].strip():
        return None
    cut = blank.start()
    both = {"chosen": chosen[cut:].strip(), "rejected": rejected[cut:].strip()}
    return Change({"prompt": chosen[:cut].strip(), **columns, **both}, "whose prompt is how both texts begin")


def scores(columns: Columns, where: str) -> Change | None:
    """Take the difference of two scores of a pair as its margin; where it is negative, they contradict which was chosen."""
    if not is_pair(columns) or "margin" in columns:
        return None
    for good, bad in SCORES:
        better, worse = number_in(columns.get(good)), number_in(columns.get(bad))
        if better is None or worse is None:
            continue
        if better < worse:
            return Change(dict(columns), dropped=f"{CONTRADICTING} ({good} < {bad})")
        return Change({**columns, "margin": better - worse}, f"with a margin, {good} - {bad}")
    return None


def ultrafeedback(columns: Columns, where: str) -> Change | None:
    """Prefer the completion with the best `overall_score` to that with the worst."""
    completions = columns.get("completions")
    if not isinstance(completions, list) or "instruction" not in columns or is_pair(columns):
        return None
    if not any(isinstance(each, Mapping) and "overall_score" in each for each in completions):
        return None
    scored = [(score, each["response"]) for each in completions if isinstance(each, Mapping)
              and (score := number_in(each.get("overall_score"))) is not None and _text(each.get("response"))]  # fmt: skip
    if len(scored) < 2:
        return Change(dict(columns), dropped=FEW_SCORES)
    best, worst = max(scored, key=lambda pair: pair[0]), min(scored, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        return Change(dict(columns), dropped=EQUAL_SCORES)
    new = {"prompt": columns["instruction"], "chosen": best[1], "rejected": worst[1], "margin": best[0] - worst[0]}
    return Change(
        without(columns, "instruction", "completions", **new),
        read_as="UltraFeedback, with the margin of best and worst",
    )


def _sentence(value: Any) -> bool:
    """Return whether a column may ask something: several words, or text of a script without blanks, or with a question mark."""
    if isinstance(value, str):
        without_blanks = sum(letter.isalpha() and letter > "\u2e7f" for letter in value) >= MIN_LETTERS
        return len(value.split()) > 1 or without_blanks or ("?" in value and "://" not in value)
    return isinstance(value, list) and any(isinstance(each, str) and "?" in each and "://" not in each for each in value)


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


_ASKED = [{"role": "user", "content": "Hi"}]
HH = Schema(
    "HH", "`chosen` and `rejected` as text with the marks `Human: ` and `Assistant: ` after blank lines; or a `prompt` with them",
    "turns", hh,
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
    {"prompt": _ASKED, "chosen": "Hello!", "rejected": "No."},
)  # fmt: skip
IMPLICIT = Schema(
    "implicit prompts", "`chosen` and `rejected` as text that begins in the same way, and no prompt",
    "a pair; the prompt is what both begin with, up to the last whole word", implicit_prompt,
    {"chosen": "Say hi. Hello!", "rejected": "Say hi. Hey you."},
    {"prompt": "Say hi.", "chosen": "Hello!", "rejected": "Hey you."},
)  # fmt: skip
MARGINS = Schema(
    "scores", f"a pair and two numbers, {', '.join(f'`{good}` and `{bad}`' for good, bad in SCORES)}",
    "their difference is the `margin` (of `loss=reward`); pairs that it contradicts are dropped, and counted", scores,
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "No.", "score_chosen": 8.5, "score_rejected": "6"},
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "No.", "margin": 2.5},
    needs=frozenset(name for names in SCORES for name in names),
)  # fmt: skip
ULTRAFEEDBACK = Schema(
    "UltraFeedback", "`instruction`, `completions` of `{response, overall_score}`",
    "a pair of the best and the worst, with their difference as `margin`; equal ones are dropped, and counted", ultrafeedback,
    {"instruction": "Hi", "completions": [{"response": "No.", "overall_score": 2}, {"response": "Hello!", "overall_score": 7.5}]},
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "No.", "margin": 5.5},
    needs=frozenset({"completions"}),
)  # fmt: skip
