"""Ranks wait for the first one as long as it takes, without a collective that would time out."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from halos.distributed import turns


class Store:
    """As torch's, of one process; it counts how often each rank has looked."""

    def __init__(self) -> None:
        self.values, self.lock, self.looks = dict[str, str](), threading.Lock(), 0
        self.waited = threading.Event()

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        self.looks += 1
        if self.looks > 20:
            self.waited.set()
        return all(key in self.values for key in keys)

    def add(self, key: str, value: int) -> int:
        with self.lock:
            self.values[key] = str(int(self.values.get(key, 0)) + value)
            return int(self.values[key])


def test_others_follow_the_first_rank_and_none_leaves_before_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PERIOD", 0.001)
    for call in ("0", "1"):
        store, told, left = Store(), list[int](), list[tuple[int, int]]()

        def work(
            rank: int, store: Store = store, told: list[int] = told, left: list[tuple[int, int]] = left, n: str = call
        ) -> None:
            with turns.first(store, rank, 3, n):
                if rank == 0:
                    assert store.waited.wait(30), "the others look, and do not go on"
                    assert not told
                told.append(rank)
            left.append((rank, len(told)))

        with ThreadPoolExecutor(3) as pool:
            for each in [pool.submit(work, rank) for rank in (2, 0, 1)]:
                each.result()
        assert told[0] == 0
        assert sorted(left) == [(0, 3), (1, 3), (2, 3)]


def test_a_single_process_waits_for_nobody() -> None:
    with turns.rank_0_first():
        pass


def test_an_error_of_the_first_rank_lets_nobody_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    with pytest.raises(RuntimeError, match="full"), turns.first(store, 0, 2, "a"):
        raise RuntimeError("full")
    assert not store.check(["halos/turn/a"])
