"""Compositions are remembered within a test run, and only those of this repository's config/."""

import pickle
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from halos.cli.compose import CONFIG, ConfigTree
from halos.cli.overrides import parse
from tests import composed

SMALL = ("model=tiny", "data=arithmetic", "exp_name=x")


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(composed.VARIABLE, str(tmp_path))
    monkeypatch.setattr(composed, "_tree", ConfigTree)
    composed.remember()
    return tmp_path


def test_what_has_been_composed_is_read_and_not_composed_again(memory: Path) -> None:
    composed.config_of("loss=dpo", *SMALL)
    (file,) = memory.iterdir()
    remembered = pickle.loads(file.read_bytes())
    remembered.seed = 12345
    file.write_bytes(pickle.dumps(remembered))
    assert composed.config_of(*SMALL, "loss=dpo").seed == 12345
    assert composed.config_of(*SMALL, "loss=kto").seed != 12345


def test_a_tree_composes_the_same_once_and_what_it_returns_may_be_changed(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, compose = list[object](), hydra.compose
    monkeypatch.setattr(hydra, "compose", lambda *given, **settings: (calls.append(given), compose(*given, **settings))[1])
    tree = ConfigTree()
    tree.compose(["loss=dpo"]).seed = 12345
    again = tree.compose(["loss=dpo"])
    again.seed += 1
    assert (again.seed, tree.compose(["loss=dpo"]).seed) == (1, 0)
    assert tree.compose(["loss=kto"]).loss_choice == "kto"
    assert len(calls) == 2
    assert ConfigTree().compose(["loss=dpo"]).seed == 0
    assert len(calls) == 3, "files may have changed between two commands"


def test_another_directory_is_always_composed_anew(memory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    own = tmp_path_factory.mktemp("config")
    ConfigTree((CONFIG, own)).compose(["loss=dpo"])
    assert list(memory.iterdir()) == []


def test_what_is_typed_for_a_key_that_takes_text_is_text() -> None:
    tree = ConfigTree()

    def given(key: str, *typed: str) -> object:
        composed_, _ = tree.compose_parsed([parse(text, tree.choices) for text in ("loss=dpo", "model=tiny", *typed)])
        return OmegaConf.select(composed_, key)

    for name in ("12e4567", "1e3", "007", "true", "1_000", "0.10"):
        assert given("exp_name", f"exp_name={name}") == name
    assert given("exp_name", "exp_name='1e3'") == "1e3"
    assert given("exp_name", "exp_name=null") is None
    assert given("model.revision", "model.revision=12e4567") == "12e4567"
    assert given("train.steps", "train.steps=1_000") == 1000
    assert given("optim.lr", "optim.lr=1e-3") == 1e-3
    assert parse("exp_name=12e4567,main,1e3", tree.choices).values == ("'12e4567'", "main", "'1e3'")
    assert parse("optim.lr=1e-3,2", tree.choices).values == ("0.001", "2")
