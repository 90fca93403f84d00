"""Runs on a stream: a resumed run sees the same batches, on any number of ranks, and what cannot be streamed is refused."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import compose
from world import World, copied, final, log_of, losses, pairs, refusal, resume, stopped

from halos.config.bind import bind_loss
from halos.config.schema import Config
from halos.config.stream_checks import complaint
from halos.data.tokenize import vocabulary_of
from halos.errors import UserError
from halos.models.load import load_tokenizer
from halos.run.lifecycle import run
from halos.run.stream_source import refuse_unfit

STREAM = ["data.stream=true", "data.stream_block=10", "train.batch_size=6"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> World:
    return World(tmp_path_factory.mktemp("world"), cache)


def blocks(cache: Path) -> list[str]:
    return [str(path) for path in (cache / "streams").rglob("*") if path.name.isdecimal()]


def test_a_run_goes_on_in_the_middle_of_a_block_with_the_same_batches(world: World, cache: Path) -> None:
    """It stops after 12 of 24 rows, of which the first block has 10."""
    whole = world.train("mixed", *STREAM)
    assert f"train      the first block of {world.data}: 10 rows, 10 examples kept" in log_of(whole)
    assert "stream     blocks of 10 rows in the order of the files, each shuffled; counts, first row," in log_of(whole)
    assert "stream     block 2: " in log_of(whole)
    before, metrics = final(whole), losses(whole)
    assert not blocks(cache), "those of a finished run are removed"
    stopped(whole)
    for words, message in (
        (["data.stream=false"], "data.stream true -> false"),
        (["data.stream_block=12"], "data.stream_block 10 -> 12"),
    ):
        assert message in refusal(whole, *words)
    assert resume(whole) == 0
    assert (final(whole), losses(whole)) == (before, metrics)
    assert "it goes on in epoch 1 with block 2; " in log_of(whole)


def test_a_row_that_cannot_be_read_ends_the_run_and_it_goes_on_once_that_is_right(world: World) -> None:
    """Step 2, of which it has a checkpoint, ends a block."""
    data, rows = world.place / "bad.jsonl", pairs(24)
    data.write_text("\n".join([*rows[:19], "{", *rows[20:]]))
    words = [*STREAM, "data.stream_block=6"]
    assert f"{data}:20: not valid JSON" in world.refusal("bad", *words, f"data.train=[{data}]")
    directory = world.place / "runs" / "bad"
    result = json.loads((directory / "result.json").read_text())
    assert (result["status"], result["step"], "bad.jsonl:20" in result["reason"]) == ("failed", 2, True)
    data.write_text("\n".join(rows))
    assert f"data.train {data} (content)" in refusal(directory)
    assert resume(directory, "resume_changes=allow") == 0
    right = world.train("right", *words)
    assert (final(directory), losses(directory)) == (final(right), losses(right))


@pytest.mark.parametrize("block", [10, 30], ids=["blocks", "one block"])
def test_the_tokens_of_all_steps_are_estimated_by_rows(world: World, block: int) -> None:
    """A block of 10 rows fills one batch of 6 and a part of the next, and 24 rows four."""
    run = world.train(f"estimated-{block}", *STREAM, f"data.stream_block={block}", "train.steps=12")
    found = re.search(r"tokens +([\d,]+) a block; about ([\d,]+) in all steps", log_of(run))
    assert found is not None
    of_block, of_all = (int(each.replace(",", "")) for each in found.groups())
    (*_, trained) = (
        row["tokens"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "tokens" in row
    )
    assert of_all == round(of_block * 72 / min(block, 24))
    assert of_all == pytest.approx(trained, rel=0.05)


def test_a_token_that_the_policy_does_not_know_is_refused_by_its_row_in_a_later_block_too(world: World, tmp_path: Path) -> None:
    known = vocabulary_of(load_tokenizer(world.base, add_tokens=[])[0])
    rows = [{"type": "binary_feedback", "prompt": f"Count {n}", "output": "x", "label": n % 2, "vocabulary": known,
             "output_ids": [5, 60_000 * (n == 7)]} for n in range(8)]  # fmt: skip
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = compose(
        world.cache,
        tmp_path / "runs",
        "loss=kto",
        f"model.name_or_path={world.base}",
        "data.eval=[]",
        "exp_name=ids",
        f"data.train=[{tmp_path}/ids.jsonl]",
        *STREAM,
        "data.stream_block=4",
        "train.batch_size=2",
        "train.steps=4",
    )
    with pytest.raises(UserError, match=r"ids\.jsonl:8 has the token id 60000, and the policy knows"):
        run(config, [])


def test_what_cannot_be_streamed_is_refused_in_one_message(world: World, cache: Path, tmp_path: Path) -> None:
    config = compose(cache, tmp_path, *world.words("refused", *STREAM))
    data, train = config.data, config.train

    def entry(**more: Any) -> Config:
        return replace(config, data=replace(data, train=[{"path": str(world.data), **more}]))

    assert complaint(config, []) is None
    for refused, message in (
        (replace(config, train=replace(train, steps=None, epochs=1.0)), "train.epochs is no length: give the number of steps"),
        (replace(config, data=replace(data, eval_fraction=0.2)), "data.eval_fraction=0.2 needs all rows before the first step"),
        (entry(epochs=2), "data.train: epochs=2 is a part of an epoch"),
        (entry(stream=True), "data.train: stream is no key of an entry"),
        (replace(config, train=replace(train, batch_size=12)), "data.stream_block=10 rows are no batch of train.batch_size=12"),
        (replace(config, reference=replace(config.reference, cache="always")), "reference.cache=always reads all rows before"),
    ):
        assert message in str(complaint(refused, []))
    idle = complaint(replace(config, data=replace(data, stream=False)), ["data.stream_block=10"])
    assert idle == "data.stream_block=10 has no effect without data.stream=true: leave it out"
    loss, grpo = (bind_loss(compose(cache, tmp_path, f"loss={name}", "train.steps=1").loss, []) for name in ("dpo", "grpo"))
    refuse_unfit(config, loss)
    with pytest.raises(UserError, match=r"split=train\[:50%\] needs the number of rows"):
        refuse_unfit(entry(split="train[:50%]"), loss)
    with pytest.raises(UserError, match=r"data\.stream: grpo compares completions of one prompt, which may be in two blocks"):
        refuse_unfit(config, grpo)


@pytest.mark.slow
def test_a_stream_resumes_on_one_and_two_processes(
    world: World, command: Callable[..., Any], tmp_path: Path, cache: Path
) -> None:
    words = ["loss=kto", f"data.train=[{world.data}]", "data.eval=[]", *STREAM, "train.steps=9", "checkpoint.every=3",
             "checkpoint.keep_last=9", "optim.lr=1e-3"]  # fmt: skip
    for launch in (1, 2):
        command(*words, f"exp_name=on{launch}", launch=launch)
    one, two = (tmp_path / f"on{launch}" for launch in (1, 2))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for launch in (1, 2):
        again = copied(two, tmp_path / f"again{launch}")
        config = (again / "config.yaml").read_text()
        (again / "config.yaml").write_text(config.replace(f"run_dir: {two}", f"run_dir: {again}"))
        shutil.rmtree(again / "FINAL")
        for step in (6, 9):
            shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
        (again / "result.json").write_text('{"status": "stopped", "step": 3, "metrics": {}}')
        command(f"resume={again}", f"cache_dir={cache}", launch=launch)
        assert losses(again) == pytest.approx(losses(two), rel=1e-5)
        assert launch == 1 or (final(again), losses(again)) == (final(two), losses(two))
    assert not blocks(cache)
    lines = world.data.read_text().splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*lines[:20], "{", *lines[21:]]))
    for launch, status in ((1, 2), (2, 1)):  # a launcher has an exit status of its own
        failed = command(*words, f"data.train=[{bad}]", f"exp_name=bad{launch}", launch=launch, check=False)
        assert failed.returncode == status
        assert f"{bad}:21: not valid JSON" in failed.stderr
        assert launch == 2 or "Traceback" not in failed.stderr
