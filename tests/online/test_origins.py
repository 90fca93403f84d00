"""What the files of two rounds were made by is compared by content."""

import json
from pathlib import Path
from typing import Any

import pytest

from halos.online.origins import scored_alike

FUNCTIONS = {"samples": "a", "functions": ["length"], "code": "1"}


@pytest.mark.parametrize(
    ("request_", "alike"),
    [
        ({**FUNCTIONS, "samples": "b"}, True),
        ({**FUNCTIONS, "functions": ["longer"]}, False),
        ({**FUNCTIONS, "code": "2"}, False),
        ({"samples": "b", "functions": ["length"]}, True),  # of an older version
        ({"samples": "b", "judge": "m", "code": "1"}, False),
        (None, True),
    ],
)
def test_scores_are_comparable_where_one_scorer_gave_them(request_: dict[str, Any] | None, alike: bool, tmp_path: Path) -> None:
    for number, asked in enumerate((FUNCTIONS, request_)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "scores.meta.json").write_text(json.dumps({"request": asked} if asked else {}))
    files = [tmp_path / str(number) / "scores.jsonl" for number in (0, 1)]
    assert scored_alike(*files, ("code", "aggregation")) is scored_alike(*files[::-1], ("code", "aggregation")) is alike
