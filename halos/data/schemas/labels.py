"""Labels of conversations, labels in words, and text alone."""

from collections.abc import Mapping

from halos.data.numbers import DESIRABLE, UNDESIRABLE, verdict_in
from halos.data.schemas.schema import ANSWERS, PROMPTS, Change, Columns, Schema, is_pair, without
from halos.errors import UserError

NAMES = ("label", "kto_tag")
OTHER_FORMS = {*PROMPTS, *ANSWERS, "chosen", "rejected", "reward", "text"}  # which a label beside messages may belong to


def labelled_talk(columns: Columns, where: str) -> Change | None:
    """Split the messages of a row that has a label before the last turn, the assistant's, which the label is about."""
    turns, name = columns.get("messages"), next((name for name in NAMES if name in columns), None)
    if name is None or not isinstance(turns, list) or len(turns) < 2 or OTHER_FORMS & columns.keys():
        return None
    is_answer = isinstance(turns[-1], Mapping) and str(turns[-1].get("role")).lower() == "assistant"
    if verdict_in(columns[name]) is None or not is_answer:
        return None
    return Change(without(columns, "messages", prompt=turns[:-1], completion=turns[-1:]), read_as="labelled messages")


def label(columns: Columns, where: str) -> Change | None:
    """Turn a verdict in words, of a completion, into true or false. Raises UserError for an unknown word."""
    if agree := {*NAMES} <= columns.keys() and verdict_in(columns["label"]) == verdict_in(columns["kto_tag"]):
        columns = without(columns, "kto_tag")
    name = next((name for name in NAMES if name in columns), None)
    if name is None or not {"prompt", "completion"} <= columns.keys() or (name == "label" and not isinstance(columns[name], str)):
        return Change(dict(columns)) if agree else None
    verdict = verdict_in(columns[name])
    if verdict is None:
        raise UserError(
            f"{where}: {name} is {columns[name]!r}, no known verdict: {', '.join(DESIRABLE)}; or {', '.join(UNDESIRABLE)}"
        )
    return Change(without(columns, name, label=verdict))


def text(columns: Columns, where: str) -> Change | None:
    """Refuse text beside a prompt or an answer, which could be either of them or both."""
    others = [name for name in (*PROMPTS, *ANSWERS, "system", "tools", "history") if columns.get(name) not in (None, "", [])]
    if not isinstance(columns.get("text"), str) or not others or is_pair(columns) or "messages" in columns:
        return None
    if {*PROMPTS} & {*others} and {*ANSWERS} & {*others}:
        return None
    nulls = ", ".join(f"{name}: null" for name in others)
    raise UserError(
        f"{where}: 'text' beside {', '.join(others)} could be the whole or a part of it: data.columns={{{nulls}}} takes it as the"
        f" whole, data.columns={{{'prompt' if others[0] in ANSWERS else 'completion'}: text}} as a part"
    )


TALKS = Schema(
    "labelled messages", "`messages` or `conversations` that end with the assistant, and a `label` (or `kto_tag`)",
    "`prompt` + `completion` + `label`: the label is about the last turn", labelled_talk,
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}], "label": False},
    {"prompt": "Hi", "completion": "No.", "label": False},
    needs=frozenset(NAMES),
)  # fmt: skip
LABELS = Schema(
    "labels in words", f"a `label` (or `kto_tag`) that says {', '.join(DESIRABLE)}; or {', '.join(UNDESIRABLE)}",
    "true or false; another word is refused", label,
    {"prompt": "Hi", "completion": "No.", "label": "Thumbs Down"}, {"prompt": "Hi", "completion": "No.", "label": False},
    needs=frozenset(NAMES),
)  # fmt: skip
TEXT = Schema(
    "text", "`text`, and no prompt or answer",
    "text without a chat template, for `loss=sft`: all of it is scored, after a BOS where the tokenizer adds one; an end token"
    " follows", text,
    {"text": "Once upon a time.", "id": 7}, {"text": "Once upon a time."},
    needs=frozenset({"text"}),
)  # fmt: skip
