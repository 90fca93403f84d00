"""Progress of tokenising: a bar on a terminal, and a line in the log every half minute."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY = 30.0  # seconds


class Progress:
    """Counts rows of all sources."""

    def __init__(self) -> None:
        self._bar = tqdm(desc="tokenising", unit=" rows", delay=2, disable=None, leave=False)
        self._began = self._logged = time.monotonic()

    def reach(self, name: str, rows: int) -> None:
        """So many rows are tokenised; the last ones are of the source `name`."""
        self._bar.update(rows - self._bar.n)
        now = time.monotonic()
        if now - self._logged >= EVERY:
            self._logged = now
            log.info("tokenising %s: %s rows so far, %.0f rows/s", name, f"{rows:,}", rows / (now - self._began))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
