#!/usr/bin/env python3
"""Check what training makes of conversations under the chat templates of known model families.

python launch/templates.py [--why] [FAMILY ...]
python launch/templates.py > tests/data/templates/table.md  # what a test compares with

Prints a table of templates (tests/data/templates) by conversations. A cell says whether a row is tokenised right: `ok`, `ok~`
(right, and counted as not continuing the generation prompt), `by turn` (right, each scored turn a sequence of its own), `refused`
(one message; --why prints it), or WRONG. What is right is found from positions of unique words in the text of the tokens, and
from the end tokens that the families document; no code that places spans is asked.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from halos.data.files import Row
from halos.data.formats import as_kind, read_example
from halos.data.tokenize import Encoded, Encoder, end_of_turn
from halos.errors import UserError
from halos.types import Comparison, Demonstration

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "data" / "templates"


@dataclass(frozen=True, slots=True)
class Family:
    """A chat template with what its public documentation says of its tokens."""

    name: str
    template: str
    opens: tuple[str, ...]  # what may precede the assistant's words, without a thought that it may open
    end: str  # the token that ends the assistant's turn
    calls_end: str  # the token that ends a turn with tool calls
    special: tuple[str, ...]
    added: tuple[str, ...]
    bos: str | None
    eos: str

    @classmethod
    def read(cls, path: Path) -> "Family":
        _, front, template = path.read_text("utf-8").split("---\n", 2)
        facts = yaml.safe_load(front)
        return cls(path.stem, template, _tuple(facts["opens"]), facts["end"], facts.get("calls_end", facts["end"]),
                   tuple(facts["special"]), tuple(facts.get("added", ())), facts.get("bos"), facts["eos"])  # fmt: skip

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A byte-level tokenizer with the family's special tokens."""
        backend = Tokenizer.from_str(_bytes())
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in self.special])
        backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in self.added])
        made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=self.bos, eos_token=self.eos, pad_token=self.eos)
        made.chat_template = self.template
        return made


def _tuple(value: str | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


@cache
def _bytes() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["User Assistant system: ["], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    return backend.to_str()


def families(names: Sequence[str] = ()) -> list[Family]:
    return [Family.read(path) for path in sorted(FIXTURES.glob("*.jinja")) if not names or path.stem in names]


# --- conversations -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Said:
    """A turn as a row has it, and its unique words in the order in which they are to be rendered."""

    turn: dict[str, Any]
    words: list[str]
    scored: bool = False
    thoughts: list[str] = field(default_factory=list)  # those of its words that are thoughts

    @property
    def calls(self) -> bool:
        return bool(self.turn.get("tool_calls"))


@dataclass(slots=True)
class Check:
    """A row, the turns of each of its completions, and how it is read."""

    row: dict[str, Any]
    talks: list[list[Said]]
    score: str = "last"
    told: tuple[str, ...] = ()  # words that must be in the prompt besides those of turns


def asks(word: str, role: str = "user") -> Said:
    return Said({"role": role, "content": word}, [word.strip()])


def says(word: str, thought: str = "", *, key: str = "") -> Said:
    if not thought:
        return Said({"role": "assistant", "content": word}, [word.strip()])
    turn = {"content": word, key: thought} if key else {"content": f"<think>\n{thought}\n</think>\n\n{word}"}
    return Said({"role": "assistant", **turn}, [thought, word], thoughts=[thought])


def calls(number: str, *, text: bool = False, content: str | None = "") -> Said:
    name, city = f"find{number}", f"Rome{number}"
    arguments = f'{{"city": "{city}"}}' if text else {"city": city}
    call = {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}
    return Said({"role": "assistant", "content": content, "tool_calls": [call]}, [name, city])


def result(word: str, name: str) -> Said:
    return Said({"role": "tool", "content": word, "name": name, "tool_call_id": "call00001"}, [word])


def messages(*turns: Said, score: str = "last", **columns: Any) -> Check:
    answers = [turn for turn in turns if turn.turn["role"] == "assistant"]
    for turn in answers if score == "all" else answers[-1:]:
        turn.scored = True
    return Check({"messages": [turn.turn for turn in turns], **columns}, [list(turns)], score)


def pair(*before: Said, one: Said, other: Said) -> Check:
    one.scored = other.scored = True
    row = {"prompt": [turn.turn for turn in before], "chosen": [one.turn], "rejected": [other.turn]}
    return Check(row, [[*before, one], [*before, other]])


def parts(said: Said) -> Said:
    said.turn["content"] = [{"type": "text", "text": said.turn["content"]}]
    return said


def _tools() -> list[dict[str, Any]]:
    kinds = {"type": "object", "properties": {"city": {"type": "string"}}}
    return [{"type": "function", "function": {"name": "weather3z", "description": "tells4z", "parameters": kinds}}]


def _demonstration() -> Check:
    said = says("say2z")
    said.scored = True
    return Check({"prompt": "ask1z", "completion": "say2z"}, [[asks("ask1z"), said]])


S = "system"
CHECKS: dict[str, Callable[[], Check]] = {
    "demo": _demonstration,
    "sys": lambda: messages(asks("be0z", S), asks("ask1z"), says("say2z")),
    "multi-last": lambda: messages(asks("ask1z"), says("say2z"), asks("ask3z"), says("say4z")),
    "multi-all": lambda: messages(asks("ask1z"), says("say2z"), asks("ask3z"), says("say4z"), score="all"),
    "sys-all": lambda: messages(asks("be0z", S), asks("ask1z"), says("say2z"), asks("ask3z"), says("say4z"), score="all"),
    "pair": lambda: pair(asks("ask1z"), one=says("good2z"), other=says("bad3z")),
    "pair-sys": lambda: pair(asks("be0z", S), asks("ask1z"), one=says("good2z"), other=says("bad3z")),
    "think-content": lambda: messages(asks("ask1z"), says("say2z", "muse3z")),
    "think-field": lambda: messages(asks("ask1z"), says("say2z", "muse3z", key="reasoning_content")),
    "think-hist": lambda: messages(
        asks("ask1z"), says("say2z", "muse3z"), asks("ask4z"), says("say5z", "muse6z"), score="all"
    ),
    "think-last": lambda: messages(asks("ask1z"), says("say2z", "muse3z"), asks("ask4z"), says("say5z")),
    "think-pair": lambda: pair(asks("ask1z"), one=says("good2z", "muse3z"), other=says("bad4z", "muse5z")),
    "tool": lambda: messages(asks("ask1z"), calls("2z"), result("out3z", "find2z"), says("say4z"), tools=None),
    "tool-all": lambda: messages(asks("ask1z"), calls("2z"), result("out3z", "find2z"), says("say4z"), score="all"),
    "tool-last": lambda: messages(asks("ask1z"), calls("2z")),
    "tool-str": lambda: messages(asks("ask1z"), calls("2z", text=True, content=None)),
    "tools": lambda: Check(**{**_fields(messages(asks("ask1z"), calls("2z"), tools=_tools())), "told": ("weather3z", "tells4z")}),
    "parts": lambda: messages(parts(asks("ask1z")), parts(says("say2z"))),
    "developer": lambda: messages(asks("be0z", "developer"), asks("ask1z"), says("say2z")),
    "space": lambda: messages(asks("ask1z "), says(" say2z "), asks("ask3z\n"), says("say4z\n\n")),
}  # fmt: skip


def _fields(check: Check) -> dict[str, Any]:
    return {"row": check.row, "talks": check.talks, "score": check.score}


# --- verdicts ----------------------------------------------------------------------------------------------------------


def verdict(family: Family, check: Check, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """Return ok, ok~, by turn, refused or WRONG, and why."""
    row = Row(check.row, "row 1")
    try:
        kind = Comparison if len(check.talks) > 1 else Demonstration
        (example,) = as_kind(read_example(row, score=check.score), kind, row)
        encoder = Encoder(tokenizer, max_length=10**6, truncation="error")
        (parts,) = encoder.encode_turns([(example, row.where)])
        fed = encoder.prompts([(example.prompt, row.where)])[0]
    except UserError as error:
        return "refused", str(error)
    except Exception as error:  # the table shows a fault of any kind
        return "WRONG", f"{type(error).__name__}: {error}"
    talks = check.talks if len(parts) == 1 else _by_turn(check.talks[0])
    whole = [part for part in parts if isinstance(part, Encoded)]
    completions = [(part.prompt, completion) for part in whole for completion in part.completions]
    if len(completions) != len(talks):
        return "WRONG", f"{len(talks)} sequences, not {len(completions)}; dropped: {set(parts) - {*whole}}"
    stops = {tokenizer.eos_token_id, *end_of_turn(tokenizer)}
    for talk, (prompt, completion) in zip(talks, completions, strict=True):
        pieces = [tokenizer.decode([token]) for token in (*prompt, *completion.ids)]
        flags = [*[False] * len(prompt), *completion.scored]
        scored = [flag for piece, flag in zip(pieces, flags, strict=True) for _ in piece]
        if fault := fault_of(family, "".join(pieces), scored, talk, check.told):
            return "WRONG", fault
        for turn in talk:
            if turn.scored and tokenizer.convert_tokens_to_ids(family.calls_end if turn.calls else family.end) not in stops:
                return "WRONG", "generation does not stop at its end token"
    exact = all(part.exact for part in whole)
    if exact and fed.tolist() != whole[0].prompt.tolist():
        return "WRONG", "the prompt is not what a sampler gets"
    return ("by turn" if len(parts) > 1 else "ok" if exact else "ok~"), ""


def _by_turn(talk: Sequence[Said]) -> list[list[Said]]:
    """Return the conversation up to each scored turn, which alone is scored then."""
    ends = [n for n, turn in enumerate(talk) if turn.scored]
    return [[*(replace(turn, scored=False) for turn in talk[:n]), talk[n]] for n in ends]


def fault_of(family: Family, text: str, scored: Sequence[bool], talk: Sequence[Said], told: Sequence[str]) -> str | None:
    """Return what is wrong with a row's text and its scored characters; None where all is right."""
    allowed, after = [False] * len(text), 0
    if family.bos and family.bos != family.eos and text.startswith(family.bos * 2):
        return "the BOS token comes twice"
    if missing := [word for word in told if word not in text]:
        return f"lost: {missing}"
    for turn in talk:
        found = [word for word in turn.words if word in text]
        if missing := [word for word in turn.words if word not in found and (turn.scored or word not in turn.thoughts)]:
            return f"lost: {missing}"
        places = [text.index(word, after) for word in found]
        first, last = min(places), max(place + len(word) for place, word in zip(places, found, strict=True))
        if turn.scored:
            end = family.calls_end if turn.calls else family.end
            opened = max(
                (place + len(opens) for opens in family.opens if (place := text.rfind(opens, after, first)) >= 0), default=-1
            )
            stop = text.find(end, last)
            if opened < 0 or stop < 0:
                return f"{turn.words}: {'not opened' if opened < 0 else f'not ended by {end}'}"
            stop += len(end)
            if not all(scored[first:stop]):
                return f"not scored: {[c for c, flag in zip(text[first:stop], scored[first:stop], strict=True) if not flag]}"
            allowed[opened:stop] = [True] * (stop - opened)
        after = last
    if other := [n for n, flag in enumerate(scored) if flag and not allowed[n]]:
        return f"scored besides its turns: {text[other[0] : other[-1] + 1]!r}"
    return "arguments are encoded twice" if '\\"city' in text else None


def cells(family: Family) -> dict[str, tuple[str, str]]:
    """Return the verdict on each conversation under a family's template, and why."""
    tokenizer = family.tokenizer()
    return {name: verdict(family, make(), tokenizer) for name, make in CHECKS.items()}


def line(*words: str) -> str:
    return f"| {' | '.join(words)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*")
    parser.add_argument("--why", action="store_true", help="print why rows are refused or wrong")
    args = parser.parse_args()
    print(line("template", *CHECKS), line(*["---"] * (len(CHECKS) + 1)), sep="\n")
    total, reasons = Counter[str](), []
    for family in families(args.family):
        found = cells(family)
        print(line(family.name, *(cell for cell, _ in found.values())), flush=True)
        total.update(cell for cell, _ in found.values())
        reasons += [f"{family.name} {name}: {cell}: {why}" for name, (cell, why) in found.items() if why]
    print("\n" + ", ".join(f"{count} {cell}" for cell, count in total.most_common()), *(reasons if args.why else ()), sep="\n")
    return 1 if total["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
