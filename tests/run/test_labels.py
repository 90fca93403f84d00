"""Held-out rows of one label: what needs both is left out, or refused where the run is to act on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from halos.errors import UserError

if TYPE_CHECKING:
    from halos.config.schema import Config

WORDS = ["loss=kto", "train.steps=2", "train.batch_size=8", "checkpoint.every=null"]


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    path = tmp_path / "good.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {n}", "completion": str(n), "label": True}) + "\n" for n in range(4)))
    return f"data.eval=[{path}]"


def test_kto_trains_and_leaves_the_margins_out(configure: Callable[..., Config], held_out: str, tmp_path: Path) -> None:
    from halos.run.lifecycle import run

    assert run(configure(*WORDS, held_out), []) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held = [row for row in rows if row["split"] == "eval"]
    assert [row["step"] for row in held] == [0, 2]
    assert all({"loss", "rewards/chosen", "kl", "z0"} <= row.keys() for row in held)
    assert not any("rewards/margins" in row or "rewards/rejected" in row for row in held)
    assert "rewards/margins needs both labels" in (tmp_path / "run" / "train.log").read_text()


def test_what_watches_the_margins_is_refused_in_words_about_labels(configure: Callable[..., Config], held_out: str) -> None:
    from halos.run.lifecycle import run

    with pytest.raises(UserError, match=r"checkpoint\.keep_best=1 watches rewards/margins.*all rows of data\.eval are desirable"):
        run(configure(*WORDS, held_out, "checkpoint.keep_best=1"), [])
