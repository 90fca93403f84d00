"""Losses that compare the samples of a prompt, where there is nothing to compare."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from halos.cli.compose import ConfigTree, plain
from halos.config.bind import LossSpec, bind_loss, refuse_single_samples
from halos.errors import UserError
from halos.online.round import Round
from halos.run.datasets import single_completions

ALONE = {"ppo", "reinforce_plus_plus"}  # they have another baseline than the other samples of the prompt


def losses() -> dict[str, LossSpec]:
    tree = ConfigTree()
    names = [name for name in tree.choices["loss"] if name not in ("online", "mixture")]  # whose losses a command names
    bound = {name: bind_loss(plain(tree.compose([f"loss={name}"]))["loss"], []) for name in names}
    return {name: loss for name, loss in bound.items() if loss.on_rollouts}


def test_single_samples_are_refused_counted_and_learned_from_by_the_losses_that_can() -> None:
    rows: Any = SimpleNamespace(groups=np.array([0, 0, 1, 2, 2, 3]))
    for name, loss in losses().items():
        refuse_single_samples(loss, 2)
        if name in ALONE:
            refuse_single_samples(loss, 1)
            assert single_completions(rows, loss) is None
            continue
        with pytest.raises(UserError, match=r"online.samples_per_prompt=1: \w+ compares the samples of a prompt"):
            refuse_single_samples(loss, 1)
        assert single_completions(rows, loss) == f"2 of 4 prompts have one completion: {loss.name} learns nothing from it"


def test_a_round_whose_groups_are_all_equal_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = {}
    for name, equal in (("grpo", 4), ("grpo", 3), ("ppo", 4)):
        online = SimpleNamespace(feedback=SimpleNamespace(threshold=None))
        plan: Any = SimpleNamespace(loss=losses()[name], directory=SimpleNamespace(path=tmp_path), online=online)
        current = Round(plan, 7, tmp_path)
        (tmp_path / "feedback.meta.json").write_text(json.dumps({"groups": 4, "groups_all_equal": equal}))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            current._warn_of_equal_groups()
        said[name, equal] = [message.partition(",")[0] for message in caplog.messages]
    assert said == {("grpo", 4): ["round 7: at all 4 prompts the samples have equal scores"], ("grpo", 3): [], ("ppo", 4): []}
