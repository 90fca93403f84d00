"""Samples, scores and feedback as files have them: to the byte what they were, and read back as what was written."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from halos.config.defaults import section
from halos.config.schema import Feedback
from halos.errors import UserError
from halos.rollout import feedback
from halos.rollout.types import Origin, Prompt, Rollout, Sample, Score, numbered, requests_for

ASKED = ({"role": "user", "content": "1 + 1?"},)
PROMPT = Prompt("a", ASKED, "train", samples=2, columns={"solution": "2"})
SEEDS = (2290199993486840126, 3975144308853378137)  # of seed 0, prompt a, samples 0 and 1


def samples() -> list[Sample]:
    requests = requests_for([PROMPT], samples=1, temperature=0.5, max_new_tokens=3, seed=0)
    said = [Sample.of(request, Origin("tiny", "v"), text, finish="stop", tokens=2, ids=(7, 1), logps=(-0.123456789, -1.0))
            for request, text in zip(requests, ("é 2", "3"), strict=True)]  # fmt: skip
    return [replace(sample, weights="w") for sample in said]


def rollouts() -> list[Rollout]:
    return [Rollout(sample, Score(value, scorer="ends")) for sample, value in zip(samples(), (1.0, 0.0), strict=True)]


def line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


ABOUT = '"prompt_id": "a", "sample_id": {n}, "prompt": [{{"role": "user", "content": "1 + 1?"}}]'
SAID = '"finish": "stop", "tokens": 2, "seed": {seed}, "temperature": 0.5, "generator": "tiny", {tokens}'
TOKENS = '"output_ids": [7, 1], "logps": [-0.1234568, -1.0], "vocabulary": "v"'
MADE_BY = '"generator": "tiny", "generator_sha256": "w", "labeller": "ends", "cost": 0.0'


def test_a_line_of_samples_is_what_it_was() -> None:
    about, said = ABOUT.format(n=0), SAID.format(seed=SEEDS[0], tokens=TOKENS)
    wanted = f'{{"type": "sample", {about}, "solution": "2", "split": "train", "output": "é 2", {said}}}'
    assert line(samples()[0].to_row()) == wanted


def test_a_line_of_scores_is_what_it_was_and_is_read_as_the_same_rollout() -> None:
    about, said = ABOUT.format(n=1), SAID.format(seed=SEEDS[1], tokens=TOKENS)
    whole = Rollout(samples()[1], Score(None, "no", 0.5, {"x": 1.0}, "ends"))
    row = whole.to_row()
    assert line(row) == (
        f'{{"type": "scalar_feedback", {about}, "solution": "2", "split": "train",'
        f' "output": [{{"role": "assistant", "content": "3"}}], {said}, "reward": null, "labeller": "ends", "cost": 0.5,'
        ' "generator_sha256": "w", "problem": "no", "parts": {"x": 1.0}}'
    )
    again = Rollout.from_row(row, "here")
    assert again.score == whole.score
    assert again.to_row() == row
    assert (again.sample.text, again.sample.ids, again.prompt.columns) == ("3", (7, 1), {"solution": "2"})


def test_lines_of_feedback_are_what_they_were() -> None:
    def first(kind: str) -> str:
        made, _ = feedback.make(rollouts(), section(Feedback), kind=kind, seed=0)
        return line(made[0].to_row())

    said = '"output": [{"role": "assistant", "content": "é 2"}], "seed": ' + str(SEEDS[0])
    common = f'{ABOUT.format(n=0)}, "reward": 1.0, {said}, {MADE_BY}, "temperature": 0.5, "finish": "stop", {TOKENS}'
    assert first("scalar") == f'{{{common}, "type": "scalar_feedback"}}'
    assert first("binary") == f'{{{common}, "type": "binary_feedback", "label": 1, "threshold": 0.5}}'
    tokens = '"finish_{0}": "stop", "output_ids_{0}": [7, 1], "vocabulary_{0}": "v", "temperature_{0}": 0.5'
    sides = f"{tokens.format('A')}, {tokens.format('B')}"
    assert first("pairwise") == (
        '{"type": "pairwise_feedback", "prompt_id": "a", "prompt": [{"role": "user", "content": "1 + 1?"}],'
        ' "output_A": [{"role": "assistant", "content": "3"}], "output_B": [{"role": "assistant", "content": "é 2"}],'
        ' "label": 0, "reward_A": 0.0, "reward_B": 1.0, "reward_difference": 1.0, "sample_id_A": 1, "sample_id_B": 0,'
        f' "seed_A": {SEEDS[1]}, "seed_B": {SEEDS[0]}, {sides}, {MADE_BY}}}'
    )


def test_columns_of_other_tools_stay_with_a_sample() -> None:
    row = {"prompt_id": 3, "instruction": "Say!", "output": "so", "dataset": "x", "generator": "theirs", "output_ids": [4]}
    (sample,) = numbered([(Sample.from_row(row, "here"), "here")])
    assert (sample.prompt.turns, sample.number, sample.finish) == (({"role": "user", "content": "Say!"},), 0, None)
    assert sample.to_row() == {
        "type": "sample", "prompt_id": "3", "sample_id": 0, "prompt": [{"role": "user", "content": "Say!"}],
        "instruction": "Say!", "dataset": "x", "output": "so", "generator": "theirs",
        "output_ids": [4],
    }  # fmt: skip


def test_two_samples_with_one_number_are_refused_with_the_line_of_the_second() -> None:
    twins = [(each, f"s.jsonl:{number}") for number, each in enumerate([*samples(), samples()[0]], 1)]
    with pytest.raises(UserError, match=r"s.jsonl:3: there is a sample 0 of prompt 'a' already"):
        list(numbered(twins))


def test_without_a_number_of_new_tokens_a_completion_has_what_its_prompt_leaves() -> None:
    prompts = [replace(PROMPT, id=str(length), samples=1, ids=np.zeros(length, np.int32)) for length in (3, 9)]
    asked = requests_for(prompts, samples=1, temperature=1.0, max_new_tokens=None, max_length=10, seed=0)
    assert [each.max_new_tokens for each in asked] == [7, 1]
    few = requests_for(prompts, samples=1, temperature=1.0, max_new_tokens=5, max_length=10, seed=0)
    assert [each.max_new_tokens for each in few] == [5, 5]
    assert (asked[0].uniforms()[:5] == few[0].uniforms()).all(), "of one seed, whatever their number"
