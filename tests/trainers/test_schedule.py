"""The learning rate by hand."""

import pytest

from halos.config.schema import Schedule
from halos.trainers.schedule import multiplier


def test_warmup_reaches_the_peak_in_its_last_step() -> None:
    schedule = Schedule(name="constant", warmup=4, final=1.0)
    assert [multiplier(schedule, step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_share_of_warmup_counts_steps() -> None:
    assert multiplier(Schedule(name="constant", warmup=0.1, final=1.0), 4, 100) == pytest.approx(0.5)


@pytest.mark.parametrize(("name", "halfway"), [("linear", 0.55), ("cosine", 0.55)])
def test_a_decay_passes_its_middle_and_ends_at_final(name: str, halfway: float) -> None:
    schedule = Schedule(name=name, warmup=0, final=0.1)
    assert multiplier(schedule, 0, 10) == pytest.approx(1.0)
    assert multiplier(schedule, 5, 10) == pytest.approx(halfway)
    assert multiplier(schedule, 10, 10) == pytest.approx(0.1)
