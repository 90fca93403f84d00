"""Parallel jobs get GPUs of their own, or a fraction of the cores."""

import pytest

from halos.errors import UserError
from halos.sweep.slots import allocate


def test_gpus_are_allocated_without_overlap():
    places = allocate(["0", "1", "2", "3", "4"], processes=2, max_parallel=None, cores=16, threads=None)
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in places] == ["0,1", "2,3"]
    assert {place.environment["OMP_NUM_THREADS"] for place in places} == {"4"}


def test_without_gpus_jobs_share_the_cores_and_one_runs_at_a_time_unless_asked():
    assert [place.environment for place in allocate([], processes=2, max_parallel=None, cores=8, threads=None)] == [
        {"OMP_NUM_THREADS": "4"}
    ]
    three = allocate([], processes=1, max_parallel=3, cores=2, threads=None)
    assert [place.environment for place in three] == [{"OMP_NUM_THREADS": "1"}] * 3


def test_threads_that_the_user_set_are_kept():
    assert allocate([], processes=1, max_parallel=2, cores=8, threads="3")[1].environment == {"OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize(
    ("processes", "most", "told"),
    [(3, None, "takes 3 GPUs, and there are 2: 0, 1"), (1, 3, "max_parallel=3: 2 GPUs fit 2 jobs of 1 processes")],
)
def test_too_few_gpus_are_refused(processes, most, told):
    with pytest.raises(UserError, match=told):
        allocate(["0", "1"], processes=processes, max_parallel=most, cores=4, threads=None)
