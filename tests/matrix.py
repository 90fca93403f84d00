"""Matrices of which the fast suite takes some cells, and `-m slow` the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(fast: Collection[Any], cells: Iterable[Any]) -> list[Any]:
    """The cells, all but those in `fast` marked slow. Raises AssertionError where a fast cell is in no matrix."""
    cells = list(cells)
    assert all(cell in cells for cell in fast), f"of {fast} some are no cells"
    return [
        pytest.param(*(cell if isinstance(cell, tuple) else (cell,)), marks=() if cell in fast else pytest.mark.slow)
        for cell in cells
    ]
