"""Weights have one hash, over all their files and whatever those are called; a base is its weights and its config.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from world import World, resume

from halos.checkpoint import lineage
from halos.errors import UserError
from halos.models.content_hashes import config_hashes


def test_every_file_of_the_weights_counts_and_their_names_do_not(tmp_path: Path) -> None:
    names = [tmp_path / f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    for number, path in enumerate(names):
        save_file({f"weight.{number}": np.full(4, number)}, path)
    whole = lineage.identity(tmp_path)
    for path in names:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"\x01")
        assert lineage.identity(tmp_path) != whole, path
        path.write_bytes(content)
        path.rename(path.with_name(f"other-{path.name}"))
    assert lineage.identity(tmp_path) == whole


def test_a_base_is_its_config_too_however_another_version_of_transformers_writes_that(tmp_path: Path, cache: Path) -> None:
    base = World(tmp_path, cache).base
    model = {"name_or_path": str(base), "revision": None, "train": {}}
    chain = lineage.begin(base, {"model": model}, content=config_hashes("model", base))
    path, settings = base / "config.json", json.loads((base / "config.json").read_text())
    older = {**settings, "torch_dtype": settings["dtype"], "rope_theta": settings["rope_parameters"]["rope_theta"]}
    for key in ("dtype", "rope_parameters", "mlp_bias"):
        del older[key]
    path.write_text(json.dumps({**older, "transformers_version": "4.40.0", "_name_or_path": "elsewhere"}))
    lineage.refuse_other_base(chain, base, "it")
    path.write_text(json.dumps({**older, "rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match=r"it was trained on .*/base, whose config.json .*: rms_norm_eps 1e-06 -> 0.5\. Restore"):
        lineage.refuse_other_base(chain, base, "it")
    del chain["runs"][0]["base"]["config"]  # as a version wrote it that recorded the file's hash alone
    with pytest.raises(UserError, match=r"model.config.json has another hash"):
        lineage.refuse_other_base(chain, base, "it")
    path.write_text(json.dumps({**settings, "transformers_version": "4.40.0"}))
    lineage.refuse_other_base(chain, base, "it")
    path.write_text(json.dumps({**settings, "rms_norm_eps": 0.5}))
    del chain["runs"][0]["content"]  # as one that recorded the weights' hash alone
    lineage.refuse_other_base(chain, base, "it")


def test_a_password_that_an_earlier_version_recorded_is_not_in_the_public_lineage() -> None:
    recorded = {"format": lineage.FORMAT, "runs": [{"config": {"online": {"scorer": {"url": "http://alice:hunter2pass@host"}}}}]}
    (run,) = lineage.public(recorded)["runs"]
    assert run["config"]["online"]["scorer"]["url"] == "http://<password>@host"


def test_settings_that_a_resume_has_changed_are_in_the_lineage_and_on_the_card(tmp_path: Path, cache: Path) -> None:
    world = World(tmp_path, cache)
    directory = world.begin("changed", "train.prove=off")
    assert resume(directory, "loss.beta=0.9", "resume_changes=allow") == 0
    (run,) = lineage.read(directory / "FINAL")["runs"]
    assert run["changed"] == [{"from": "checkpoints/step-00000002", "keys": {"loss.beta": [0.1, 0.9]}}]
    assert run["config"]["loss"]["beta"] == 0.9
    assert "| checkpoints/step-00000002 | loss.beta | 0.1 | 0.9 |" in (directory / "FINAL" / "README.md").read_text()
    (before,) = lineage.read(directory / "checkpoints" / "step-00000002")["runs"]
    assert "changed" not in before


def test_only_changes_on_the_line_of_training_that_led_here_are_listed(tmp_path: Path, cache: Path) -> None:
    directory = World(tmp_path, cache).train("superseded", "train.steps=6", "train.prove=off", "optim.lr=1e-3")

    def changed(step: int, *words: str) -> list[dict[str, Any]]:
        checkpoint = directory / "checkpoints" / f"step-{step:08d}"
        assert resume(checkpoint, *words, "resume_changes=allow") == 0
        (run,) = lineage.read(directory / "FINAL")["runs"]
        card = (directory / "FINAL" / "README.md").read_text().splitlines()
        rows = [line for line in card if line.startswith("| checkpoints/")]
        listed = run.get("changed", [])
        expected = [(change["from"], key, *values) for change in listed for key, values in change["keys"].items()]
        assert rows == [f"| {' | '.join(map(str, row))} |" for row in expected]
        return [{change["from"][-1]: change["keys"]} for change in listed]

    first = {"2": {"optim.lr": [1e-3, 5e-4], "loss.beta": [0.1, 0.5]}}
    assert changed(2, "optim.lr=5e-4", "loss.beta=0.5") == [first]
    assert changed(4, "optim.lr=2e-4") == [first, {"4": {"optim.lr": [5e-4, 2e-4]}}]
    assert changed(4, "optim.lr=3e-4") == [first, {"4": {"optim.lr": [5e-4, 3e-4]}}]
    assert changed(2, "loss.beta=0.1") == [{"2": {"optim.lr": [1e-3, 3e-4]}}]  # lr stays as the last attempt had it
    assert changed(4, "optim.lr=1e-3") == [{"2": {"optim.lr": [1e-3, 3e-4]}}, {"4": {"optim.lr": [3e-4, 1e-3]}}]
    assert changed(2) == []
