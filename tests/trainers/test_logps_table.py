"""Log-probs are found by what the row holds; what is damaged, half written or of something else is not found at all."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from halos.examples import Completion, PackRow, row_hash
from halos.trainers.logps_table import ARRAYS, HASH, LogpsCache, Part, Table
from halos.trainers.reference_rows import cut

FACTS = {"weights": "of a model", "data": "of rows"}


def row(prompt: list[int], ids: list[int], scored: list[bool]) -> PackRow:
    return np.array(prompt, np.int32), Completion(np.array(ids, np.int32), np.array(scored))


def part(*seeds: int) -> Part:
    """Rows of 0, 1, 2 ... tokens."""
    hashes = np.array([row_hash(row([seed], [1], [True])) for seed in seeds], HASH)
    return Part.of(hashes, [np.arange(seed, dtype=np.float32) - 100 * seed for seed in seeds])


def test_a_rows_hash_is_of_its_tokens_and_of_which_are_scored() -> None:
    rows = [row([1, 2], [3, 4], [True, True]), row([1, 2], [3, 4], [False, True]), row([1], [2, 3, 4], [False, True, True]),
            row([1, 2], [3, 5], [True, True]), row([1, 2, 3], [4], [True])]  # fmt: skip
    assert len({row_hash(each) for each in rows}) == len(rows)
    wide = np.array([1, 2], np.int64), Completion(np.array([3, 4], np.int64), np.array([True, True]))
    assert row_hash(wide) == row_hash(rows[0]), "whatever the integers' width"


def test_a_table_finds_every_row_and_no_other() -> None:
    tables = [Table.of(each.hashes, each.counts, each.logps) for each in (part(0, 3, 1, 7, 2), part(7, 2, 1, 0, 3))]
    assert tables[0].content == tables[1].content, "of rows in another order"
    for seed in (0, 1, 2, 3, 7):
        found = tables[0].find(part(seed).hashes[0])
        assert found is not None
        np.testing.assert_array_equal(found, part(seed).logps)
    for other in (part(4).hashes[0], b"\x00" * 16, b"\xff" * 16):
        assert tables[0].find(other) is None
    assert Table.of(*(getattr(part(), name) for name in ("hashes", "counts", "logps"))).find(b"a" * 16) is None


def published(place: Path, *parts: Part) -> LogpsCache:
    cache = LogpsCache(place, FACTS)
    cache.publish(parts)
    return cache


def test_a_published_table_is_that_of_its_facts_alone(tmp_path: Path) -> None:
    cache = published(tmp_path, part(3, 1), part(2))
    table = cache.open()
    assert table is not None
    assert table.content == Table.of(*(getattr(part(1, 2, 3), name) for name in ("hashes", "counts", "logps"))).content
    other = LogpsCache(tmp_path, {**FACTS, "weights": "of another"})
    assert other.open() is None
    shutil.copytree(cache.path, other.path)
    assert other.open() is None, "another's numbers under this name"


@pytest.mark.parametrize("name", [*(f"{name}.npy" for name in ARRAYS), "manifest.json"])
@pytest.mark.parametrize("damage", ["edited", "truncated", "missing"])
def test_a_damaged_table_is_not_opened(name: str, damage: str, tmp_path: Path) -> None:
    cache = published(tmp_path, part(3, 1, 2))
    path = cache.path / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:] if damage == "edited" else whole[:-1])
    if damage == "missing":
        path.unlink()
    assert cache.open() is None
    published(tmp_path, part(3, 1, 2))
    assert cache.open() is not None, "it is written again"


def test_a_part_is_found_again_only_whole_and_of_the_same_rows_and_facts(tmp_path: Path) -> None:
    cache, mine = LogpsCache(tmp_path, FACTS), part(3, 1)
    assert cache.part(0, mine.hashes) is None
    cache.keep(0, mine)
    found = cache.part(0, mine.hashes)
    assert found is not None
    np.testing.assert_array_equal(found.logps, mine.logps)
    assert cache.part(1, mine.hashes) is None
    assert cache.part(0, part(1, 3).hashes) is None
    other = LogpsCache(tmp_path, {**FACTS, "data": "of others"})
    shutil.copytree(cache.parts, other.parts)
    assert other.part(0, mine.hashes) is None
    file = cache.parts / "000000.safetensors"
    whole = file.read_bytes()
    for size in range(0, len(whole), 7):  # as an interrupted write of a lesser file system may leave it
        file.write_bytes(whole[:size])
        assert cache.part(0, mine.hashes) is None
    for at in range(8, len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        changed = cache.part(0, mine.hashes)
        assert changed is None or np.array_equal(changed.logps, mine.logps), at  # a name in the header that nobody reads


def test_a_full_disk_is_the_systems_error_as_whoever_writes_a_part_expects(tmp_path: Path) -> None:
    cache = LogpsCache(tmp_path, FACTS)
    cache.parts.mkdir(parents=True)
    (cache.parts / ".000000.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        cache.keep(0, part(3, 1))


def test_two_processes_do_not_compute_the_same_table(tmp_path: Path) -> None:
    one, other, third = (LogpsCache(tmp_path, facts) for facts in (FACTS, FACTS, {**FACTS, "data": "of others"}))
    assert one.acquire()
    assert not other.acquire()
    assert third.acquire()
    one.release()
    assert other.acquire()


def test_things_are_cut_by_total_and_number() -> None:
    def cuts(sizes: list[int], budget: int | None, most: int | None) -> list[list[int]]:
        return [each.tolist() for each in cut(sizes, budget, most)]

    assert cuts([3, 3, 3, 9, 1], 6, None) == [[0, 1], [2], [3], [4]]
    assert cuts([1, 1, 1, 1, 1], None, 2) == [[0, 1], [2, 3], [4]]
    assert cuts([1, 1, 9], 5, 2) == [[0, 1], [2]]
    assert cuts([1, 2], None, None) == [[0, 1]]
    assert cuts([], 5, 5) == []
