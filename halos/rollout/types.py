"""What a sampler is asked for and what it gives back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Row = dict[str, Any]
TRAIN, EVAL = "train", "eval"  # what a row is for


def key_of(row: Mapping[str, Any]) -> tuple[str, int]:
    """Which sample a row is about."""
    return str(row["prompt_id"]), int(row.get("sample_id") or 0)


def text_of(output: Any) -> str:
    """A completion as text, whether a record has it as text or as messages."""
    if isinstance(output, str):
        return output
    return "\n".join(str(turn.get("content") or "") for turn in output or ())


def question(row: Mapping[str, Any]) -> str:
    """A prompt as text, for people and rubrics: one turn as it is, several with their roles."""
    prompt = row["prompt"] if "prompt" in row else row.get("instruction")
    if isinstance(prompt, str):
        return prompt
    turns = list(prompt or ())
    if len(turns) == 1:
        return str(turns[0].get("content") or "")
    return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in turns)


@dataclass(frozen=True, slots=True)
class Request:
    """One completion of one prompt. The same request gives the same text (of one engine, on one kind of hardware)."""

    key: tuple[str, int]  # prompt_id, sample_id
    ids: tuple[int, ...]  # the prompt's tokens, the template's generation prompt included
    messages: tuple[Mapping[str, Any], ...]  # the same as turns, for engines that speak text
    seed: int
    temperature: float  # 0: the likeliest token each time
    max_new_tokens: int

    def uniforms(self) -> np.ndarray:
        """One number in (0, 1) for each token that may come: (max_new_tokens,) float64, the same in every numpy."""
        bits = np.random.Philox(np.random.SeedSequence(self.seed)).random_raw(self.max_new_tokens)
        return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Completion:
    """What was sampled. `ids` and `logps` (of the softmax at the request's temperature, before top_p and top_k) may be
    unknown to engines that speak text; the end token is among them where it was sampled."""

    text: str
    ids: tuple[int, ...]
    logps: tuple[float, ...]
    finish: str  # stop | length
    tokens: int  # sampled, as the engine counts them


def row_of(request: Request, completion: Completion, prompt: Row, *, generator: str, vocabulary: str) -> Row:
    """What is kept of a sample; `vocabulary` names the tokenizer that its ids are of."""
    kept: Row = {"type": "sample", "prompt_id": request.key[0], "sample_id": request.key[1], "prompt": prompt["prompt"]}
    kept |= {name: prompt[name] for name in ("solution", "split") if name in prompt}
    kept |= {"output": completion.text, "finish": completion.finish, "tokens": completion.tokens, "seed": request.seed}
    kept |= {"temperature": request.temperature, "generator": generator}
    if completion.ids:
        kept |= {"output_ids": list(completion.ids), "logps": [round(logp, 7) for logp in completion.logps]}
        kept |= {"vocabulary": vocabulary}
    return kept


class Engine(Protocol):
    """Gives completions as they come, in whatever order."""

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Completion]]: ...


def seed_of(seed: int, prompt_id: str, sample_id: int) -> int:
    """A request's own: 63 bits."""
    text = f"{seed}/{prompt_id}/{sample_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def requests_for(
    prompts: Sequence[Row], ids: Sequence[np.ndarray], *, samples: int, temperature: float, max_new_tokens: int, seed: int
) -> list[Request]:
    """Every sample of every prompt, in order. A prompt's own `samples` and `temperature` come first."""
    return [
        Request(
            key=(str(row["prompt_id"]), number),
            ids=tuple(map(int, prompt)),
            messages=tuple(row["prompt"]),
            seed=seed_of(seed, str(row["prompt_id"]), number),
            temperature=float(row.get("temperature", temperature)),
            max_new_tokens=max_new_tokens,
        )
        for row, prompt in zip(prompts, ids, strict=True)
        for number in range(int(row.get("samples", samples)))
    ]
