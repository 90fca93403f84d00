"""Evaluation data with one label: metrics that need both are left out, or refused if the run depends on them."""

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
def eval_data(tmp_path: Path) -> str:
    path = tmp_path / "good.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {n}", "completion": str(n), "label": True}) + "\n" for n in range(4)))
    return f"data.eval=[{path}]"


def test_kto_trains_and_leaves_the_margins_out(configure: Callable[..., Config], eval_data: str, tmp_path: Path) -> None:
    from halos.run.lifecycle import run

    assert run(configure(*WORDS, eval_data), []) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if row["split"] == "eval"]
    assert [row["step"] for row in evaluations] == [0, 2]
    assert all({"loss", "rewards/chosen", "kl", "z0"} <= row.keys() for row in evaluations)
    assert not any("rewards/margins" in row or "rewards/rejected" in row for row in evaluations)
    assert "rewards/margins needs both labels" in (tmp_path / "run" / "train.log").read_text()


def test_a_run_that_depends_on_the_margins_is_refused(configure: Callable[..., Config], eval_data: str) -> None:
    from halos.run.lifecycle import run

    with pytest.raises(UserError, match=r"checkpoint\.keep_best=1 watches rewards/margins.*all rows of data\.eval are desirable"):
        run(configure(*WORDS, eval_data, "checkpoint.keep_best=1", "checkpoint.every=1"), [])
