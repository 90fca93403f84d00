"""Conditional SFT: the control token stands once, in front, on a row of its own."""

import copy

import numpy as np
import pytest

from halos.losses.csft import csft, examples
from halos.losses.sft import sft
from halos.types import Demonstration, Judgement

from .samples import gradients, logps, numbers

PROMPT = ({"role": "user", "content": "Add 2 and 2."},)
ANSWER = ({"role": "assistant", "content": "4"},)
TOKENS = {"desirable_token": "<|good|>", "undesirable_token": "<|bad|>"}


@pytest.mark.parametrize(("desirable", "content"), [(True, "<|good|>4"), (False, "<|bad|>4")])
def test_good_and_bad_completions_are_both_imitated_behind_their_token(desirable: bool, content: str):
    made = examples(Judgement(PROMPT, ANSWER, desirable), **TOKENS)
    assert made == Demonstration(PROMPT, ({"role": "assistant", "content": content},))


def test_control_tokens_do_not_pile_up_over_epochs():
    """HALOs prepends in place, so a row met three times begins with three tokens."""
    row = Judgement(PROMPT, ANSWER, True)
    before = copy.deepcopy(row)
    made = [examples(row, **TOKENS) for _ in range(3)]
    assert row == before
    assert ANSWER == ({"role": "assistant", "content": "4"},)
    assert made[0] == made[1] == made[2]
    assert made[2].completion[0]["content"].count("<|good|>") == 1


def test_only_the_first_turn_of_a_long_completion_carries_the_token():
    turns = (
        {"role": "assistant", "content": "Let me look."},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    )
    made = examples(Judgement(PROMPT, turns, False), **TOKENS)
    assert [turn["content"] for turn in made.completion] == ["<|bad|>Let me look.", "4", "It is 4."]


def test_a_turn_that_only_calls_a_tool_keeps_its_call():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    made = examples(Judgement(PROMPT, (call,), True), **TOKENS)
    assert made.completion[0] == {**call, "content": "<|good|>"}
    assert call["content"] is None


def test_the_loss_is_the_cross_entropy_of_everything_scored():
    policy = logps([[-0.5, -1.0], [-2.0]])
    loss = csft(policy)
    assert loss.per == "token"
    assert numbers(loss).sum() / 3 == pytest.approx(3.5 / 3)
    assert numbers(loss) == pytest.approx(numbers(sft(policy)))
    (gradient,) = gradients(loss, policy.values)
    assert np.unique(gradient[policy.mask]).tolist() == [-1]
