"""Weights have one hash, over all their files and whatever those are called."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from halos.checkpoint import lineage


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


def test_a_password_that_an_earlier_version_recorded_is_not_in_the_public_lineage() -> None:
    recorded = {"format": lineage.FORMAT, "runs": [{"config": {"online": {"scorer": {"url": "http://alice:hunter2pass@host"}}}}]}
    (run,) = lineage.public(recorded)["runs"]
    assert run["config"]["online"]["scorer"]["url"] == "http://<password>@host"
