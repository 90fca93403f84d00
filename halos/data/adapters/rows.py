"""Adapters of single rows: HH, PKU-SafeRLHF, s1K-1.1 and WildBench."""

from collections.abc import Mapping
from typing import Any

from halos.data.schemas.pairs import hh_turns

NOT_TURNS, PARTED, UNANSWERED = "that are no conversations", "whose prompts differ", "with an empty answer"


def hh(row: Mapping[str, Any]) -> dict[str, Any] | str:
    """A pair of conversations as text that differ in their last answer (arXiv:2204.05862); a few differ earlier."""
    chosen, rejected = hh_turns(row["chosen"]), hh_turns(row["rejected"])
    if chosen is None or rejected is None:
        return NOT_TURNS
    for turns in (chosen, rejected):
        if turns[-1]["role"] != "assistant" or not turns[-1]["content"]:
            return UNANSWERED
    if chosen[:-1] != rejected[:-1]:
        return PARTED
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def safe_rlhf(row: Mapping[str, Any]) -> dict[str, Any]:
    """Two responses, and the number of the better one (arXiv:2310.12773)."""
    responses = [row["response_0"], row["response_1"]]
    better = {0: 0, 1: 1}[row["better_response_id"]]
    return {"prompt": row["prompt"], "chosen": responses[better], "rejected": responses[1 - better]}


def s1k(row: Mapping[str, Any]) -> dict[str, Any]:
    """A question with a thought and an attempt of DeepSeek-R1 (arXiv:2501.19393)."""
    thought, attempt = row["deepseek_thinking_trajectory"].strip(), row["deepseek_attempt"].strip()
    return {
        "prompt": row["question"],
        "completion": f"<think>\n{thought}\n</think>\n\n{attempt}",
        "solution": row.get("solution"),
    }


def wildbench(row: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation that ends with the user, and GPT-4's answer where it is there (arXiv:2406.04770)."""
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["conversation_input"]]
    answer = (row.get("references") or {}).get("gpt-4")
    return {"prompt": turns, **({"completion": answer} if answer else {})}
