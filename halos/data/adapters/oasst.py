"""OpenAssistant (arXiv:2304.07327): messages in trees, with ranks of the answers to one message."""

from collections.abc import Iterator, Mapping
from typing import Any

from halos.data.adapters.adapter import Read
from halos.data.row import Row
from halos.errors import UserError

ROLES = {"prompter": "user", "assistant": "assistant"}
INCOMPLETE, NO_BETTER = "whose conversation is not whole", "whose next better answer is deleted"


def oasst(read: Read, purpose: str) -> Iterator[Row]:
    """Yield a pair for each answer and the one ranked just above it, with the path from the root as its prompt."""
    messages, answers, rows = dict[str, Mapping[str, Any]](), dict[tuple[Any, Any], Mapping[str, Any]](), list[Row]()
    for row in read():
        if row.left_out:
            yield row
            continue
        if missing := [name for name in ("message_id", "parent_id", "text", "role", "rank") if name not in row.record]:
            raise UserError(
                f"{row.where}: no row of oasst, which has {', '.join(missing)}; columns found: {', '.join(row.record)}"
            )
        message = row.record
        messages[message["message_id"]] = message
        if message["role"] == "assistant" and message["rank"] is not None and not message.get("deleted"):
            answers[message["parent_id"], int(message["rank"])] = message
            rows.append(row)
    for row in rows:
        worse = row.record
        better = answers.get((worse["parent_id"], int(worse["rank"]) - 1))
        if better is None:
            if int(worse["rank"]) > 0:  # the best has none above it
                yield Row({}, row.where, left_out=True, note=NO_BETTER)
            continue
        prompt = _path(messages, worse["parent_id"])
        if prompt is None:
            yield Row({}, row.where, left_out=True, note=INCOMPLETE)
        else:
            yield Row({"prompt": prompt, "chosen": better["text"], "rejected": worse["text"]}, row.where, original=dict(worse))


def _path(messages: Mapping[str, Mapping[str, Any]], last: str | None) -> list[dict[str, str]] | None:
    """Return the turns from the root to a message; None where one is missing, or they go in a circle."""
    turns, seen = list[dict[str, str]](), set[str]()
    while last is not None:
        if last not in messages or last in seen:
            return None
        seen.add(last)
        message = messages[last]
        turns.append({"role": ROLES.get(message["role"], str(message["role"])), "content": message["text"]})
        last = message["parent_id"]
    return turns[::-1] or None
