"""Stanford Human Preferences (arXiv:2110.08420): two comments on a post, of which one has the higher score."""

import hashlib
import heapq
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from halos.data.adapters.adapter import Read, converted
from halos.data.row import Row

MOST = 5  # pairs of a post in training: some posts have hundreds
SEED = 0
BEYOND = f"beyond {MOST} pairs of a prompt"
_BEFORE_PUNCTUATION = re.compile(r" +(?=[.,!?;:](\s|$))")


def shp(read: Read, purpose: str) -> Iterator[Row]:
    """Yield pairs; for training at most `MOST` of a post, the same in every run."""
    kept = _sample(read()) if purpose == "train" else None
    for number, row in enumerate(read()):
        if kept is not None and not row.left_out and number not in kept:
            yield Row({}, row.where, left_out=True, note=BEYOND)
        else:
            yield converted(row, "SHP", _pair)


def _sample(rows: Iterator[Row]) -> set[int]:
    """Return the numbers of the rows that are kept: of each post those with the least hashes of the seed and the row."""
    hashes = defaultdict[bytes, list[tuple[bytes, int]]](list)  # by post
    for number, row in enumerate(rows):
        if not row.left_out:
            post = hashlib.blake2b(str(row.record.get("history")).encode(), digest_size=8).digest()
            answers = [row.record.get("human_ref_A"), row.record.get("human_ref_B")]
            draw = hashlib.blake2b(repr([SEED, *answers]).encode(errors="surrogatepass"), digest_size=8).digest()
            hashes[post].append((draw, number))
    return {number for draws in hashes.values() for _, number in heapq.nsmallest(MOST, draws)}


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    answers = [_tidied(row["human_ref_A"]), _tidied(row["human_ref_B"])]
    better = {1: 0, 0: 1}[row["labels"]]  # 1 where A is preferred
    return {"prompt": _tidied(row["history"]), "chosen": answers[better], "rejected": answers[1 - better]}


def _tidied(text: str) -> str:
    return _BEFORE_PUNCTUATION.sub("", text).strip()
