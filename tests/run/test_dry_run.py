"""A dry run writes a page into the directory that the run would use, for refused data too."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import train
from halos.config.schema import Config
from halos.errors import UserError
from halos.run.lifecycle import run
from halos.rundir import is_run
from tests.conftest import SMALL
from tests.inspection.test_page import Reader


def page_of(config: Config) -> Reader:
    return Reader((Path(config.run_dir) / "dry_run.html").read_text())


def test_the_page_shows_what_the_run_would_train_on_and_need(
    configure: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure("loss=dpo", "dry_run=true", "dry_run_rows=7")
    assert run(config, ["loss=dpo", "dry_run=true"]) == 0
    read, said = page_of(config), capsys.readouterr().out
    assert not is_run(Path(config.run_dir))
    assert f"page       {config.run_dir}/dry_run.html" in said
    header = said.partition("page  ")[0].strip()
    assert header.splitlines()[0].startswith("loss       dpo")
    assert all(line.strip() in read.text for line in header.splitlines()), "the page has the header as it is logged"
    for words in ("This run would start.", "loss=dpo", "arithmetic (train)", "48", "the longest", "prompt and completion",
                  "tokens of an epoch", "checkpoint", "rejected"):  # fmt: skip
        assert words in read.text, words
    assert read.tags.count("article") == 6, "as many of each of the two sources"
    assert re.search(r"^tokens     [\d,]+ an epoch; .* in all steps.*\nlongest    a batch of [\d,]+ tokens", said, re.M), (
        "as a run says"
    )
    assert run(config, []) == 0, "another dry run replaces the page"


def test_a_refused_run_has_a_page_too(configure: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"type": "scalar_feedback", "prompt": "Who?", "output": "me", "masked": True}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({**row, "reward": n}) + "\n" for n in range(4)))
    for dry in ("true", "false"):
        config = configure("loss=grpo", f"data.train=[{data}]", "data.eval=[]", "train.batch_size=8", f"dry_run={dry}")
        with caplog.at_level(logging.INFO), pytest.raises(UserError, match="no token of any example is scored"):
            run(config, [])
    assert "This run would be refused" in page_of(config).text
    assert not is_run(Path(config.run_dir))


@pytest.mark.parametrize(
    ("where", "modules", "is_named"),
    [("completion", "embed_tokens", True), ("completion", "embed_tokens,lm_head", False), ("prompt", "embed_tokens", False)],
)
def test_a_token_that_was_added_and_cannot_be_learned_is_named(
    where: str, modules: str, is_named: bool, configure: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, other = tmp_path / "rows.jsonl", {"completion": "prompt", "prompt": "completion"}[where]
    data.write_text("".join(json.dumps({where: f"<think>{n}", other: f"It is {n}"}) + "\n" for n in range(4)))
    words = ["loss=sft", f"data.train=[{data}]", "data.eval=[]", "model.add_tokens=['<think>']", "dry_run=true"]
    assert run(configure(*words, "peft=lora", f"peft.modules_to_save=[{modules}]"), []) == 0
    said = " ".join(capsys.readouterr().out.split())
    text = "4 examples have scored tokens of model.add_tokens (<think>), whose rows of the output head are frozen"
    assert (text in said) == is_named


def test_a_pinned_step_beyond_the_end_of_the_run_is_refused_and_of_epochs_a_warning(
    configure: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    beyond = "checkpoint.pinned has 9, and the run ends at step {0}, so nothing would be saved there: give steps up to {0}"
    config = configure("loss=sft", "checkpoint.pinned=[6,9]", "dry_run=true")
    with pytest.raises(UserError, match=re.escape(beyond.format(6))):
        run(replace(config, train=replace(config.train, steps=6)), [])
    for steps, said in ((8, True), (9, False)):
        epochs = f"train.epochs={steps / 6}"  # of 48 rows, 8 in a batch
        config = configure("loss=sft", "checkpoint.pinned=[9]", "train.batch_size=8", epochs, "dry_run=true")
        assert run(config, []) == 0
        assert (beyond.format(8) in str(capsys.readouterr())) is said


def test_a_run_says_that_its_best_checkpoints_are_judged_by_earlier_evaluations(
    configure: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    for eval_every, said in ((4, True), (3, False)):
        words = ["checkpoint.keep_best=1", "checkpoint.every=6", f"train.eval_every={eval_every}", "dry_run=true"]
        assert run(configure("loss=sft", *words), []) == 0
        assert ("no multiple of train.eval_every=4, so" in str(capsys.readouterr())) is said


def test_a_live_loop_and_rounds_show_their_prompts(tmp_path: Path, cache: Path) -> None:
    words = ["loss=online", "online.loss=grpo", *SMALL, "online.scorer.functions=[exact_match]", "dry_run=true"]
    for name, loop in (("live", ["online.steps=3", "train.batch_size=8"]), ("rounds", ["online.rounds=2"])):
        place = [f"output_root={tmp_path}", f"cache_dir={cache}", f"exp_name={name}"]
        assert train.start([*words, *loop, *place]) == 0
        read = Reader((tmp_path / name / "dry_run.html").read_text())
        assert read.tags.count("article") == 20, name
        assert "as the sampler gets it" in read.text
        assert "How many" in read.text.replace("·", " ")
        assert f"exp_name={name}" in read.text
