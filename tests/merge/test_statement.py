"""Of right merges none fails its proof, of wrong ones none passes it."""

import random
from pathlib import Path

import pytest
from statement import BESIDE, FAULTS, draw, right

from halos.errors import UserError

RIGHT, WRONG = 500, 100


def _right(seeds: range, place: Path) -> list[str]:
    failed = []
    for seed in seeds:
        trial = draw(seed, place / f"right-{seed}")
        if (result := right(trial)).faults:
            failed.append(f"{seed}: {trial.words}: {result}")
    return failed


def _wrong(seeds: range, place: Path) -> list[str]:
    passed = []
    for seed in seeds:
        fault = FAULTS[seed % len(FAULTS)]
        trial = draw(10_000 + seed, place / f"wrong-{seed}", alone=fault.__name__ not in BESIDE)
        try:
            result = fault(trial, random.Random(seed)).prove()
        except UserError:
            continue  # refused before anything was written
        if result.holds:
            passed.append(f"{seed} {fault.__name__}: {trial.words}: {result}")
    return passed


def test_a_sample_of_right_merges_holds_and_of_wrong_ones_fails(tmp_path: Path) -> None:
    assert _right(range(20), tmp_path) == []
    assert _wrong(range(len(FAULTS)), tmp_path) == []


@pytest.mark.slow
def test_every_right_merge_holds_and_every_wrong_one_fails(tmp_path: Path) -> None:
    assert _right(range(RIGHT), tmp_path) == []
    assert _wrong(range(WRONG), tmp_path) == []
