"""Learning rates computed by hand, step by step."""

import math
from types import SimpleNamespace

import pytest

from halos.config.bind_optim import bind_schedule
from halos.errors import UserError
from halos.schedules import LearningRates, constant, cosine, inverse_sqrt, linear, wsd


def test_warmup_reaches_the_peak_in_its_last_step() -> None:
    assert [constant(step, 100, warmup=4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_warmup_is_a_fraction_or_a_whole_number_of_steps() -> None:
    for warmup in (0, 0.5, 1, 7.0):
        bind_schedule({"_target_": "halos.schedules.constant", "warmup": warmup}, [])
    for warmup in (1.5, math.inf):
        with pytest.raises(UserError, match=r"schedule.warmup takes a number \(at least 0 and whole from 1\), not"):
            bind_schedule({"_target_": "halos.schedules.constant", "warmup": warmup}, [])


def test_a_warmup_below_one_is_a_fraction_of_the_steps() -> None:
    assert constant(4, 100, warmup=0.1) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_a_decay_passes_its_midpoint_and_ends_at_final(schedule) -> None:
    rates = [schedule(step, 10, warmup=0, final=0.1) for step in (0, 5, 10)]
    assert rates == pytest.approx([1.0, 0.55, 0.1])


def test_a_cosine_falls_slowly_at_first() -> None:
    assert cosine(7, 12, warmup=4, final=0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi * 3 / 8)))
    assert linear(7, 12, warmup=4, final=0.0) == pytest.approx(1 - 3 / 8)


def test_the_stable_phase_ends_where_the_decay_begins() -> None:
    shape = {"warmup": 2, "decay": 0.4, "final": 0.0}
    assert [wsd(step, 10, **shape, shape="linear") for step in range(10)] == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    )
    assert [wsd(step, 10, **shape, shape="sqrt") for step in (6, 7, 8)] == pytest.approx([1, 0.5, 1 - math.sqrt(0.5)])
    assert wsd(9, 10, warmup=8, decay=5, final=0.5, shape="linear") == pytest.approx(0.75), "no decay before warm-up has ended"


def test_an_inverse_square_root_halves_when_the_steps_are_four_times_as_many_whatever_the_end() -> None:
    assert [inverse_sqrt(step, total, warmup=25) for step, total in ((24, 100), (99, 100), (99, 10**6))] == [1.0, 0.5, 0.5]


def test_every_group_has_its_own_peak() -> None:
    groups = [{"lr": 0.4}, {"lr": 2.0}]
    rates = LearningRates(SimpleNamespace(param_groups=groups), lambda step, total: (step + 1) / total, 8)
    for step, wanted in ((0, [0.05, 0.25]), (3, [0.2, 1.0]), (7, [0.4, 2.0])):
        rates.set(step)
        assert [group["lr"] for group in groups] == wanted
