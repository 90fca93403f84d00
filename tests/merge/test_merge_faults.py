"""Of right merges none fails its proof, of wrong ones none passes it."""

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import expert_merge_faults
import merge_faults
import pytest
from merge_faults import Fault, Trial

from halos.errors import UserError

RIGHT, WRONG = 500, 100  # of models without experts, and as many of mixtures
FLIPPED = 17  # where bfloat16 sends several tokens to other experts than float32
Draw = Callable[..., Trial]


def _right(draw: Draw, seeds: Iterable[int], place: Path) -> list[str]:
    failed = []
    for seed in seeds:
        trial = draw(seed, place / f"right-{seed}")
        if (result := merge_faults.right(trial)).faults:
            failed.append(f"{seed}: {trial.words}: {result}")
    return failed


def _wrong(draw: Draw, faults: Sequence[Fault], seeds: range, place: Path) -> list[str]:
    passed = []
    for seed in seeds:
        fault = faults[seed % len(faults)]
        trial = draw(10_000 + seed, place / f"wrong-{seed}", alone=fault.__name__ not in merge_faults.BESIDE)
        try:
            result = fault(trial, random.Random(seed)).prove()
        except UserError:
            continue  # refused before anything was written
        if result.holds:
            passed.append(f"{seed} {fault.__name__}: {trial.words}: {result}")
    return passed


def test_a_sample_of_right_merges_holds_and_of_wrong_ones_fails(tmp_path: Path) -> None:
    assert _right(merge_faults.draw, range(5), tmp_path) == []
    assert _wrong(merge_faults.draw, merge_faults.FAULTS, range(len(merge_faults.FAULTS)), tmp_path) == []


def test_a_sample_of_right_mixtures_holds_and_of_wrong_ones_fails(tmp_path: Path) -> None:
    faults = expert_merge_faults.FAULTS
    assert _right(expert_merge_faults.draw, [*range(3), FLIPPED], tmp_path) == []
    assert _wrong(expert_merge_faults.draw, faults, range(len(faults)), tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "faults"),
    [(merge_faults.draw, merge_faults.FAULTS), (expert_merge_faults.draw, expert_merge_faults.EVERY)],
    ids=["any", "mixtures"],
)
def test_every_right_merge_holds_and_every_wrong_one_fails(draw: Draw, faults: Sequence[Fault], tmp_path: Path) -> None:
    assert _right(draw, range(RIGHT), tmp_path) == []
    assert _wrong(draw, faults, range(WRONG), tmp_path) == []
