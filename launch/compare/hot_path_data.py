"""The pairs and groups that hot_path.py trains on."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from halos.data import arithmetic, gsm8k
from halos.errors import UserError
from halos.types import Comparison

PROMPT, GROUP = 200, 8  # of GRPO: tokens of a prompt, and its completions
WORDS = 33  # of a made-up completion in the middle

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Pair:
    prompt: Messages
    chosen: Messages
    rejected: Messages
    lengths: tuple[int, int, int]  # tokens of each


def read(data: Path | None, seed: int, words: int = WORDS) -> Iterator[tuple[Messages, Messages, Messages]]:
    """Prompt, chosen and rejected of a file of pairs, of a directory with GSM8K, or, without either, of made-up words."""
    if data is None:
        yield from made_up(random.Random(seed), words)
    elif data.is_dir():
        for row in gsm8k.rows(gsm8k.file_for(data, Comparison), Comparison, "train"):
            yield tuple(turns(row.record[key], key) for key in ("prompt", "chosen", "rejected"))  # type: ignore[misc]
    else:
        for number, line in enumerate(data.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                yield tuple(turns(row[key], key) for key in ("prompt", "chosen", "rejected"))  # type: ignore[misc]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{data}:{number}: a row has prompt, chosen and rejected, text or messages; {error!r}") from error


def turns(value: Any, key: str) -> Messages:
    if isinstance(value, str):
        return [{"role": "user" if key == "prompt" else "assistant", "content": value}]
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def made_up(draw: random.Random, completion: int = WORDS, count: int = 2000) -> Iterator[tuple[Messages, Messages, Messages]]:
    """Pairs with the lengths of dialogues: about 140 words of a prompt and 45 of a completion, a few several times as long.
    `completion`: its words in the middle."""
    words = sorted({word for row in islice(arithmetic.rows("train"), 200) for word in str(row["prompt"]).split()})
    for _ in range(count):
        around = completion * draw.lognormvariate(0, 0.6)
        lengths = [draw.lognormvariate(4.7, 0.7), *(around * draw.lognormvariate(0, 0.35) for _ in range(2))]
        texts = [" ".join(draw.choices(words, k=max(3, round(length)))) for length in lengths]
        yield turns(texts[0], "prompt"), turns(texts[1], "chosen"), turns(texts[2], "rejected")


def choose(data: Path | None, tokenizer: Any, *, count: int, limit: int, seed: int, words: int = WORDS) -> tuple[list[Pair], int]:
    """`count` pairs in random order, and how many others before the last were too long. `words`: of made-up completions.
    Raises UserError if there are too few."""
    every, kept, dropped = list(read(data, seed, words)), list[Pair](), 0
    random.Random(seed).shuffle(every)
    for prompt, chosen, rejected in every:
        if len(kept) == count:
            break
        start = len(encode(tokenizer, prompt, add_generation_prompt=True))
        lengths = [len(encode(tokenizer, prompt + each)) - start for each in (chosen, rejected)]
        if start + max(lengths) > limit or min(lengths) < 1:
            dropped += 1
            continue
        kept.append(Pair(prompt, chosen, rejected, (start, *lengths)))  # type: ignore[arg-type]
    if len(kept) < count:
        raise UserError(
            f"{data or 'the made-up data'}: {len(kept)} pairs have at most {limit} tokens, and {count} are needed: fewer --steps,"
            " a smaller --batch-size, or a larger --max-length"
        )
    return kept, dropped


def encode(tokenizer: Any, messages: Messages, **options: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]


def groups(pairs: Sequence[Pair], tokenizer: Any, *, count: int, limit: int) -> list[tuple[Messages, list[Messages], list[int]]]:
    """For GRPO: `count` prompts of PROMPT tokens, each with GROUP completions of the pairs, and the lengths of all.

    Text is not what is measured: a prompt joins those of the pairs, and completions are those of any pairs.
    """
    words = " ".join(turn["content"] for pair in pairs for turn in pair.prompt).split()
    room = [(pair, key) for pair in pairs for key in ("chosen", "rejected")]
    room = [(p, key) for p, key in room if PROMPT + p.lengths[1 if key == "chosen" else 2] <= limit]
    if not room:
        raise UserError(f"no completion fits into --max-length {limit} after a prompt of {PROMPT} tokens")
    made = []
    for number in range(count):
        first = number * 40 % max(1, len(words) - PROMPT)
        here = [f"{number}.", *words[first:], *words * (1 + PROMPT // max(1, len(words)))][
            : 2 * PROMPT
        ]  # no two prompts are equal
        while len(encode(tokenizer, (prompt := turns(" ".join(here), "prompt")), add_generation_prompt=True)) > PROMPT:
            here.pop()
        picked = [room[(number * GROUP + k) % len(room)] for k in range(GROUP)]
        lengths = [len(encode(tokenizer, prompt, add_generation_prompt=True))]
        lengths += [pair.lengths[1 if key == "chosen" else 2] for pair, key in picked]
        made.append((prompt, [getattr(pair, key) for pair, key in picked], lengths))
    return made
