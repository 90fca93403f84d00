"""Runs on mixtures of sources: what the header says of them, and a resume that goes on where the run stopped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from world import World, final, log_of, losses, pairs, refusal, resume, stopped


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> World:
    world = World(tmp_path_factory.mktemp("world"), cache)
    (world.place / "more.jsonl").write_text("\n".join(pairs(10, "never")))
    return world


def mixed(world: World, one: str, other: str) -> str:
    return f"data.train=[{{path: {world.data}, {one}}}, {{path: {world.place / 'more.jsonl'}, {other}}}]"


def test_a_mixture_goes_on_where_the_run_stopped_bit_for_bit_and_the_header_counts_its_passes(world: World) -> None:
    words = ["train.batch_size=6", mixed(world, "weight: 1", "weight: 3")]
    whole = world.train("mixed", *words)
    assert "s: 9 of an epoch's 34 examples (26.5%), 0.375 passes over its 24" in log_of(whole)
    assert "more: 25 of an epoch's 34 examples (73.5%), 2.5 passes over its 10" in log_of(whole)
    before, metrics = final(whole), losses(whole)
    assert resume(stopped(whole)) == 0
    assert (final(whole), losses(whole)) == (before, metrics)
    assert final(world.train("whole_files", "train.batch_size=6", mixed(world, "epochs: 1", "epochs: 1"))) != before
    stopped(whole)
    message = refusal(whole, mixed(world, "weight: 1", "weight: 2"))
    assert "data.train" in message
    assert "would no longer compute what it began" in message


def test_a_run_of_an_earlier_version_keeps_its_rule_of_weights(world: World) -> None:
    """There a weight was of each entry's own rows, and its configuration has no data.weights."""
    words = ["train.batch_size=6", mixed(world, "weight: 1", "weight: 2")]
    whole, other = world.train("before", *words, "data.weights=rows"), world.train("since", *words)
    before = final(whole)
    assert final(other) != before
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["data"].pop("weights") == "rows"
    (whole / "config.yaml").write_text(yaml.safe_dump(config))
    assert resume(stopped(whole)) == 0
    assert final(whole) == before


def test_what_does_not_fit_together_is_refused_before_anything_is_read(world: World) -> None:
    for words, message in (
        ([mixed(world, "weight: 1", "split: train")], "has a weight and"),
        ([mixed(world, "name: a", "name: a")], "data.train: 2 entries have the name a"),
        ([mixed(world, "weight: nan", "weight: 1")], "weight=nan must be a number above 0"),
        ([f"data.eval=[{{path: {world.eval_data}, count: 3}}]"], "data.eval: count=3 has no effect"),
    ):
        assert message in world.refusal("refused", "model.name_or_path=no/such-model", *words), words


def test_a_run_on_held_out_rows_resumes_and_they_belong_to_what_it_computes(world: World) -> None:
    words = [
        f"data.train=[{world.data}, {world.place / 'more.jsonl'}]",
        "data.eval=[]",
        "data.eval_fraction=0.3",
        "train.batch_size=6",
    ]
    whole = world.train("apart", *words, "data.near_duplicates=null", "objective.metric=more/loss", "objective.mode=min")
    assert "held out for evaluation" in log_of(whole)
    (line,) = (json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines() if '"eval"' in line)
    assert line["s/examples"] + line["more/examples"] == line["examples"] > 4
    before = final(whole)
    assert resume(stopped(whole)) == 0
    assert final(whole) == before
    assert "data.eval_fraction 0.3 -> 0.2" in refusal(stopped(whole), "data.eval_fraction=0.2")
    for more, message in (
        (["data.near_duplicates=0.5"], "data.near_duplicates is of prompts that are held out"),
        (["data.eval_fraction=0"], "data.eval_fraction"),
        (["data.eval_fraction=nan"], "data.eval_fraction"),
        (["data.eval_fraction=0.1", "data.near_duplicates=1.5"], "data.near_duplicates"),
    ):
        assert message in world.refusal("refused", *more)
    few = [*words, "data.eval_fraction=0.2", "data.near_duplicates=null", "objective.metric=more/loss", "objective.mode=min"]
    assert "no row of more is held out" in world.refusal("refused", *few), "by their hashes 17, 16 and 19 are, of the first file"


@pytest.mark.slow
def test_a_mixture_resumes_on_one_and_two_processes(command: Callable[..., Any], tmp_path: Path, cache: Path) -> None:
    parts = "{path: arithmetic, split: 'train[:9]', weight: 1}, {path: arithmetic, split: 'train[9:13]', weight: 2}"
    words = ["loss=dpo", f"data.train=[{parts}]", "train.batch_size=5", "train.steps=4", "checkpoint.every=2", "optim.lr=1e-3"]
    whole = tmp_path / "run"
    command(*words, "exp_name=run", launch=2)
    before, metrics = final(whole), losses(whole)
    for launch in (2, 1):
        again = Path(shutil.copytree(whole, tmp_path / f"on{launch}"))
        config = (again / "config.yaml").read_text()
        (again / "config.yaml").write_text(config.replace(f"run_dir: {whole}", f"run_dir: {again}"))
        command(f"resume={stopped(again)}", f"cache_dir={cache}", launch=launch)
        assert losses(again) == pytest.approx(metrics, rel=1e-5)
        assert launch == 1 or (final(again), losses(again)) == (before, metrics)
