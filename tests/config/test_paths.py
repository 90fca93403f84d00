"""Paths are made absolute for exactly the keys that the schema marks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halos.config import paths
from halos.config.schema import Config, path_keys

ONLINE = ("loss=online", "online.loss=dpo", "online.scorer.functions=[exact_match]")
NAMED = {
    "model.name_or_path", "model.chat_template", "reference.name_or_path", "data.train", "data.eval", "data.root",
    "peft.init_from", "optim.init_from", "online.sampler.python", "online.scorer.model", "online.scorer.rubric",
}  # fmt: skip


def test_existing_paths_are_made_absolute(
    configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Any = configure(*ONLINE)
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert set(path_keys()) == NAMED
    for scorer, there in (("reward_model", str(tmp_path / "here")), ("judge", "here")):  # a judge has but a name
        for key in NAMED:
            section, name = paths._section(config, key)
            paths._put(section, name, ["here", "org/name"] if key in ("data.train", "data.eval") else "here")
        config.online.scorer.name = scorer
        paths._make_absolute(config)
        assert (config.online.scorer.model, config.model.chat_template) == (there, str(tmp_path / "here"))
        assert config.data.train == [str(tmp_path / "here"), "org/name"]


def test_a_run_without_the_section_of_a_key_is_left_unchanged(configure: Callable[..., Config]) -> None:
    config = configure("loss=sft")
    assert paths._section(config, "online.scorer.model") == (None, "model")
    paths._make_absolute(config)
