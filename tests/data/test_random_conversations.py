"""Random conversations under known families' templates, held against the rule of launch/templates.py."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from halos.data.tokenize import Encoded, Encoder
from halos.types import Demonstration
from launch.templates import Family, Said, families, fault_of

NAMES = ("apertus", "chatml", "command-a", "gemma-3", "glm-4.5", "gpt-oss", "llama-2", "phi-3", "qwen-3", "qwen-3-2507", "vicuna")
WORDS = (
    "the",
    "sum",
    "{{ x }}",
    "{% y %}",
    "```",
    "User:",
    "\\n",
    '"',
    "é",
    "😀",
    "ﬁ",
    "\u202e",
    "\x00",
    "\n",
    "\n\n",
    " ",
    "  ",
)
TOKENS = (
    "<|im_start|>assistant\n",
    "<|im_end|>",
    "<|end|>",
    "<|user|>",
    "</s>",
    "<s>",
    "<end_of_turn>",
    "<think>",
    "[INST]",
    "[/INST]",
)
PIECES = (*WORDS, *TOKENS)  # of which some families have some as special tokens


@cache
def family(name: str) -> tuple[Family, PreTrainedTokenizerFast, Encoder]:
    (found,) = families([name])
    made = found.tokenizer()
    return found, made, Encoder(made, max_length=10**6, truncation="error")


@st.composite
def conversations(draw: st.DrawFn) -> list[Said]:
    """Draw a conversation with all of the assistant's turns scored; each turn's words stand between two words of its own."""
    roles = (["system"] if draw(st.booleans()) else []) + ["user", "assistant"] * draw(st.integers(1, 3))
    talk = []
    for number, role in enumerate(roles):
        words = [f"begin{number}z", f"end{number}z"]
        inner = "".join(draw(st.lists(st.sampled_from(PIECES), max_size=6)))
        blank = [draw(st.sampled_from(["", " ", "\n", "\n\n "])) for _ in range(2)]
        talk.append(
            Said({"role": role, "content": blank[0] + words[0] + inner + words[1] + blank[1]}, words, role == "assistant")
        )
    return talk


@pytest.mark.parametrize("name", NAMES)
def test_every_scored_turn_is_scored_whole_with_its_end_and_nothing_else(name: str):
    known, made, encoder = family(name)

    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @given(conversations())
    def holds(talk: list[Said]) -> None:
        asked = next(n for n, turn in enumerate(talk) if turn.scored)
        turns = tuple(turn.turn for turn in talk)
        (parts,) = encoder.encode_turns([(Demonstration(turns[:asked], turns[asked:]), "")])
        ends = [n for n, turn in enumerate(talk) if turn.scored]
        for part, end in zip(parts, ends[-1:] if len(parts) == 1 else ends, strict=True):
            assert isinstance(part, Encoded)
            said = [
                Said(turn.turn, turn.words, turn.scored and (len(parts) == 1 or n == end))
                for n, turn in enumerate(talk[: end + 1])
            ]
            pieces = [made.decode([token]) for token in (*part.prompt, *part.completions[0].ids)]
            flags = [*[False] * len(part.prompt), *part.completions[0].scored]
            scored = [flag for piece, flag in zip(pieces, flags, strict=True) for _ in piece]
            assert fault_of(known, "".join(pieces), scored, said, ()) is None
            ids = [*part.prompt, *part.completions[0].ids]
            assert ids == made(made.decode(ids), add_special_tokens=False)["input_ids"], "as its text is tokenised at once"

    holds()
