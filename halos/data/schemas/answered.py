"""Prompts and answers under other names: Alpaca, questions with answers, Orca."""

from typing import Any

from halos.data.schemas.schema import ANSWERS, PROMPTS, Change, Columns, Schema, is_pair, without
from halos.errors import UserError

INPUTS = ("input", "context")  # what an instruction or a question is about
_CANONICAL = ({"prompt", "completion"}, {"messages"})


def system_prompt(columns: Columns, where: str) -> Change | None:
    """Name Orca's `system_prompt` as others do."""
    words = columns.get("system_prompt")
    if words is None:
        return None
    if columns.get("system") not in (None, "", words):
        raise UserError(f"{where}: columns 'system' and 'system_prompt' differ: data.columns={{system_prompt: null}} drops one")
    return Change(without(columns, "system_prompt", system=words))


def alpaca(columns: Columns, where: str) -> Change | None:
    """Join an instruction or a question with what it is about, and with the `history` before it: lists of [question, answer]."""
    asked = next((name for name in PROMPTS if name in columns), None)
    if asked is None or "messages" in columns or columns.get("type") == "prompt":
        return None
    about = [name for name in INPUTS if asked != "prompt" and _words(columns.get(name))]
    if len(about) > 1:
        raise UserError(f"{where}: both 'input' and 'context' may belong to {asked}: data.columns={{context: null}} drops one")
    history = _history(columns.get("history"))
    parts = [*about, *(["history"] if history else [])]
    if not parts:
        is_blank = asked == "instruction" and isinstance(columns.get("input"), str)  # an Alpaca row that is about nothing
        return Change(without(columns, "input"), read_as="Alpaca") if is_blank else None
    prompt = columns[asked]
    if not isinstance(prompt, str):
        raise UserError(f"{where}: {', '.join(parts)} beside {asked}, which is no text")
    prompt = "\n\n".join(text for text in (prompt, *(columns[name] for name in about)) if text.strip())
    turns = [*history, {"role": "user", "content": prompt}] if history else prompt
    changed = without(columns, *parts, **{asked: turns})
    return (
        Change(changed, read_as="Alpaca") if asked == "instruction" else Change(changed, f"with {', '.join(parts)} in the prompt")
    )


def _history(value: Any) -> list[dict[str, str]]:
    """Return the turns of a list of [question, answer]; none for anything else."""
    pairs = value if isinstance(value, list) else []
    if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs):
        return []
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


def answered(columns: Columns, where: str) -> Change | None:
    """Name the one column that asks `prompt`, and the one that answers `completion`. Raises UserError where several could be."""
    if _is_canonical(columns):
        return None
    if is_pair(columns):
        return _pair(columns, where)
    asked = _one(columns, (*PROMPTS, "input") if not {*PROMPTS} & columns.keys() else PROMPTS, "prompt", where)
    answer = _one(columns, ANSWERS, "completion", where) if asked else None
    if asked is None or answer is None:
        return None
    new = without(columns, *PROMPTS, *ANSWERS, *([asked] if asked == "input" else []))
    return Change({"prompt": columns[asked], "completion": columns[answer], **new}, read_as=f"{asked} + {answer}")


def _pair(columns: Columns, where: str) -> Change | None:
    if "prompt" in columns or any(_starts_with_prompt(columns[name]) for name in ("chosen", "rejected")):
        return None
    asked = _one(columns, (*PROMPTS, "input") if not {*PROMPTS} & columns.keys() else PROMPTS, "prompt", where)
    return Change(without(columns, asked, prompt=columns[asked]), read_as=f"{asked} + chosen + rejected") if asked else None


def _starts_with_prompt(turns: Any) -> bool:
    return isinstance(turns, list) and not (turns and isinstance(turns[0], dict) and turns[0].get("role") == "assistant")


def _one(columns: Columns, names: tuple[str, ...], role: str, where: str) -> str | None:
    """Return the name of the one column that may be `role`. Raises UserError for several with different content."""
    found = [name for name in names if columns.get(name) not in (None, "")]
    if any(columns[name] != columns[found[0]] for name in found[1:]):
        kept = role if role in found else found[0]
        others = ", ".join(f"{name}: null" for name in found if name != kept)
        raise UserError(
            f"{where}: any of {', '.join(found)} could be the {role}: data.columns={{{others}}} takes {kept}, for example"
        )
    return found[0] if found else None


def _is_canonical(columns: Columns) -> bool:
    return any(form <= columns.keys() for form in _CANONICAL)


def _words(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


ORCA = Schema(
    "Orca", "`system_prompt`, `question`, `response`; or `system`, `question`, `chosen`, `rejected`",
    "`prompt` + `completion`, or a pair, after a system turn", system_prompt,
    {"system_prompt": "Be brief.", "question": "Hi", "response": "Hello!"},
    {"system": "Be brief.", "prompt": "Hi", "completion": "Hello!"},
    needs=frozenset({"system_prompt"}),
)  # fmt: skip
ALPACA = Schema(
    "Alpaca", "`instruction`, `input`, `output`, perhaps `history` of [question, answer]; or with `chosen` and `rejected`",
    "`prompt` (instruction, blank line, input) + `completion`, or a pair", alpaca,
    {"instruction": "Add.", "input": "1, 1", "output": "2", "text": "Below is an instruction. Add. 1, 1. 2"},
    {"prompt": "Add.\n\n1, 1", "completion": "2"},
    needs=frozenset({*INPUTS, "history"}),
)  # fmt: skip
ANSWERED = Schema(
    "questions and answers",
    f"one of {', '.join(f'`{name}`' for name in PROMPTS)} (or `input`) and one of {', '.join(f'`{name}`' for name in ANSWERS)}",
    "`prompt` + `completion`; a `context` follows the question", answered,
    {"question": "1 + 1?", "answer": "2"}, {"prompt": "1 + 1?", "completion": "2"},
    needs=frozenset({*PROMPTS, *ANSWERS, "input"} - {"prompt", "completion"}),
)  # fmt: skip
