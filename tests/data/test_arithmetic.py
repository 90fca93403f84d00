"""The bundled word problems are fixed, split without overlap, and labelled correctly."""

import hashlib
import json
from collections import Counter

import pytest

from halos.data import arithmetic
from halos.rollout.rewards import exact_match, final_answer


def test_no_question_is_in_both_splits() -> None:
    train, held_out = ({problem.question for problem in arithmetic.problems(split)} for split in ("train", "eval"))
    assert (len(train), len(held_out)) == (4800, 400)
    assert not train & held_out


def test_the_problems_never_change() -> None:
    rows = [row for split in ("train", "eval") for row in arithmetic.rows(split)]
    found = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    assert found == "57a726edd5306bc1c26519f57aeecf4cfb93c1b60a757df06c9f4f8a2be745ee"


def test_solutions_are_right_and_wrong_as_labelled() -> None:
    for problem in arithmetic.problems("train"):
        assert exact_match(problem.solution, {"solution": str(problem.answer)}) == 1
        assert exact_match(problem.wrong, {"solution": str(problem.answer)}) == 0
        assert final_answer(problem.wrong) is not None


def test_every_mistake_is_as_likely() -> None:
    counts = Counter(problem.mistake for problem in arithmetic.problems("train"))
    assert set(counts) == set(arithmetic.MISTAKES)
    assert max(counts.values()) - min(counts.values()) <= 2


def test_length_does_not_reveal_the_wrong_solution() -> None:
    problems = arithmetic.problems("train")
    longer = sum(len(p.wrong) > len(p.solution) for p in problems) / len(problems)
    shorter = sum(len(p.wrong) < len(p.solution) for p in problems) / len(problems)
    assert abs(longer - shorter) < 0.1


def test_another_split_is_refused() -> None:
    with pytest.raises(ValueError, match="no split 'test'"):
        arithmetic.problems("test")
