"""Near-duplicate texts, found in time linear in their number: MinHash signatures in bands (LSH), then the Jaccard similarity.

Broder, On the resemblance and containment of documents (1997); Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4.
"""

import hashlib
import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np

WORDS = 3  # of a shingle
HASHES = 64  # of a signature
RECALL = 0.999  # probability with which two texts as similar as the threshold share a band
PER_BAND = 8  # texts of each group that are compared with a new one of the same band, which bounds the time for templates
SKETCH = 512  # shingles of a text that are kept, those of the smallest hashes: of a longer one the similarity is an estimate
SLACK = 0.2  # four standard deviations of the similarity that signatures estimate

# a run of letters and digits, or one character of a script that is written without spaces
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_RAW = np.random.Philox(np.random.SeedSequence(0)).random_raw(2 * HASHES)
_FACTORS, _SHIFTS = _RAW[:HASHES] | np.uint64(1), _RAW[HASHES:]  # multiply-shift hashing, of 64 bits to 32
_MIX = np.uint64(0x9E3779B97F4A7C15)


def shingles(text: str) -> np.ndarray:
    """Return hashes of each three words in a row, sorted, each once; of all words where there are fewer: (n,) uint64."""
    words = _WORD.findall(text) or [text]
    hashed = np.array([_hash(word) for word in words], np.uint64)
    parts = (
        [hashed[start : len(hashed) - WORDS + 1 + start] for start in range(WORDS)]
        if len(words) >= WORDS
        else list(hashed[:, None])
    )
    mixed = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        mixed = (mixed ^ part) * _MIX
        mixed ^= mixed >> np.uint64(29)
    mixed.sort()
    return mixed[np.append(True, mixed[1:] != mixed[:-1])]  # several times as fast as np.unique


@lru_cache(1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest())


def signature(shingled: np.ndarray) -> np.ndarray:
    """Return the smallest of all shingles under each of several hashes: (HASHES,) uint32."""
    least = np.full(HASHES, 2**32 - 1, np.uint64)
    for start in range(0, len(shingled), 4096):
        part = shingled[start : start + 4096, None]
        least = np.minimum(least, ((part * _FACTORS + _SHIFTS) >> np.uint64(32)).min(0))
    return least.astype(np.uint32)


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Return the Jaccard similarity of two sorted sets of shingles; of sets that were cut at SKETCH, an estimate."""
    union = np.union1d(one, other)
    union = union[:SKETCH] if SKETCH in (len(one), len(other)) else union
    both = np.intersect1d(one, other, assume_unique=True)
    return int((both <= union[-1]).sum()) / len(union)


def rows_of_band(threshold: float) -> int:
    """Return the hashes of a band: as many as find two texts of this similarity with probability RECALL, since more of them find
    fewer texts that are less similar."""
    fitting = [rows for rows in range(1, HASHES + 1) if 1 - (1 - threshold**rows) ** (HASHES // rows) >= RECALL]
    return max(fitting, default=1)


class Described(NamedTuple):
    """A text as it is compared."""

    shingled: np.ndarray  # (at most SKETCH,) uint64
    signed: np.ndarray  # (HASHES,) uint32
    bands: list[tuple[int, bytes]]


class NearDuplicates:
    """Texts in two groups, each of which can be asked for one that is as similar to another as `threshold`."""

    def __init__(self, threshold: float) -> None:
        self._threshold, self._rows = threshold, rows_of_band(threshold)
        self._texts = list[Described]()
        self._bands: tuple[dict[tuple[int, bytes], tuple[int, ...]], ...] = {}, {}  # of each group: texts by band

    def describe(self, text: str) -> Described:
        found, rows = shingles(text), self._rows
        signed = signature(found)
        bands = [(band, signed[band * rows : (band + 1) * rows].tobytes()) for band in range(HASHES // rows)]
        return Described(found[:SKETCH], signed, bands)

    def add(self, text: Described, group: int) -> None:
        """Add a text to group 0 or 1."""
        number, by_band = len(self._texts), self._bands[group]
        self._texts.append(text._replace(bands=[]))
        for band in text.bands:
            if len(texts := by_band.get(band, ())) < PER_BAND:
                by_band[band] = (*texts, number)

    def has_similar(self, text: Described, group: int) -> bool:
        by_band = self._bands[group]
        candidates = dict.fromkeys(number for band in text.bands for number in by_band.get(band, ()))
        return any(
            (self._texts[number].signed == text.signed).mean() >= self._threshold - SLACK
            and similarity(text.shingled, self._texts[number].shingled) >= self._threshold
            for number in candidates
        )
