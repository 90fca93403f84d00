"""Saves and resumes where a second thing went wrong too: nothing is mistaken for something else, dropped or discarded."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from world import World, attempts, copied, refusal, resume, stopped

from halos import confined
from halos.checkpoint import __main__ as cli
from halos.checkpoint import commit, known_good, select
from halos.checkpoint.weights import HEAD_FILE, VALUE_HEAD
from halos.config.schema import Config
from halos.distributed.replicated import Replicated
from halos.errors import UserError
from halos.hooks.base import Hook
from halos.run.lifecycle import run
from halos.rundir import RunDir
from halos.trainers.base import Trainer

ROLLOUTS = ["train.steps=4", "train.batch_size=8", "checkpoint.every=2", "checkpoint.keep_last=9", "train.max_length=128",
            "train.eval_at_start=false", "train.log_every=1", "data.eval=[]"]  # fmt: skip


class Counts(Hook):
    """Takes back what it gave, and nothing else."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> World:
    made = World(tmp_path_factory.mktemp("world"), cache)
    made.train("run")
    return made


@pytest.fixture(scope="module")
def ppo(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    config = compose(cache, tmp_path_factory.mktemp("ppo"), "loss=ppo", *ROLLOUTS, "reference.cache=never")
    assert run(config, []) == 0
    return Path(config.run_dir)


@pytest.fixture
def finished(world: World, tmp_path: Path) -> Path:
    return copied(world.place / "runs" / "run", tmp_path)


@pytest.fixture
def begun(finished: Path) -> Path:
    return stopped(finished)


@pytest.fixture
def of_rollouts(ppo: Path, tmp_path: Path) -> Path:
    """Of a run on rollouts that is to go on from step 2."""
    return stopped(copied(ppo, tmp_path))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# --- where a run goes on


def test_where_the_last_good_checkpoint_is_damaged_and_later_ones_are_doubted_a_run_does_not_begin_again(finished: Path) -> None:
    shutil.rmtree(finished / "FINAL")
    (finished / "result.json").unlink()
    known_good.write(RunDir(finished), known_good.KnownGood(2, doubted_at=4))
    flip(finished / "checkpoints" / "step-00000002" / "model" / "model.safetensors")
    with pytest.raises(UserError, match=r"none of them is whole and known to be good .*step-00000004 passed over: no step after"):
        select.select_checkpoint(RunDir(finished), None)
    known_good.write(RunDir(finished), known_good.KnownGood(-1, doubted_at=4))
    assert select.select_checkpoint(RunDir(finished), None).path is None, "where none was ever good, step 0 was"


def test_a_record_of_checkpoints_that_is_damaged_says_that_there_were_some(begun: Path) -> None:
    shutil.rmtree(begun / "checkpoints")
    path = begun / "checkpoints.jsonl"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    with pytest.raises(UserError, match=r"has saved checkpoints, by .*checkpoints.jsonl \(line 1: contents changed\), and none"):
        select.select_checkpoint(RunDir(begun), None)


def test_a_run_that_began_again_and_died_before_its_first_save_begins_again_once_more(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(finished / "FINAL")
    (finished / "result.json").unlink()
    known_good.write(RunDir(finished), known_good.KnownGood(-1, doubted_at=4))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_backward", die)
        with pytest.raises(KeyboardInterrupt):
            resume(finished)
    assert not select.checkpoints(finished / "checkpoints")
    assert resume(finished) == 0
    assert [each["resumed_from"] for each in attempts(finished)[1:]] == ["nothing: step 0"] * 2


def test_a_hook_that_was_not_there_at_the_save_begins_at_the_resume(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "counted", sys.modules[__name__])
    assert resume(begun, "plugins=[counted]", "+hooks.counts={_target_: counted.Counts}") == 0


def test_a_configuration_that_cannot_be_read_is_no_traceback(begun: Path) -> None:
    (begun / "checkpoints" / "step-00000002" / "model" / "config.json").write_text("")
    assert "whether its model has dropout is unknown" in refusal(begun, "train.microbatch_size=2")


def test_hidden_files_of_somebody_else_outlive_a_resume(begun: Path) -> None:
    mine = [begun / ".notes.2024", begun / "checkpoints" / ".env.1"]
    ours = begun / ".result.json.4711"
    for path in (*mine, ours):
        path.write_text("")
    commit.remove_leftovers(begun)
    commit.remove_leftovers(begun / "checkpoints")
    assert [path.exists() for path in (*mine, ours)] == [True, True, False]


# --- where it ends


def test_weights_of_a_last_step_that_no_attempt_has_looked_at_are_looked_at_before_final(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["optim.lr=1e18", "train.steps=1", "data.eval=[]", "loss=sft", "train.max_grad_norm=null", "schedule=constant",
             "schedule.warmup=0", "train.prove=off"]  # fmt: skip
    whole = Trainer._backward

    def told(self: Trainer, *given: Any) -> Any:
        self.run.stop_requested = "SIGTERM"
        return whole(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_backward", told)
        assert run(compose(world.cache, world.place / "runs", *world.words("told", *overrides)), []) == 75
    directory = world.place / "runs" / "told"
    assert resume(directory) == 1
    assert "no FINAL was saved: with the last weights" in json.loads((directory / "result.json").read_text())["reason"]


def test_a_disk_without_room_for_small_files_costs_them_and_not_the_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    write, append, clip = confined.write_whole, confined.append, Replicated.clip

    def full(path: Path, *given: Any, **more: Any) -> None:
        if path.name in ("good.json", "bad_steps.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        (append if path.suffix == ".jsonl" else write)(path, *given, **more)

    monkeypatch.setattr(confined, "write_whole", full)
    monkeypatch.setattr(confined, "append", full)
    norms = iter([1.0, float("nan"), 1.0, 1.0])
    monkeypatch.setattr(Replicated, "clip", lambda *given: clip(*given) * next(norms))
    directory = world.train("full", "checkpoint.every=1", "checkpoint.keep_last=1")
    assert [path.name for path in select.checkpoints(directory / "checkpoints")] == ["step-00000004"], "which room is wanted for"
    assert (json.loads((directory / "result.json").read_text())["status"], known_good.read(RunDir(directory)).until) == (
        "finished",
        -1,
    )


def test_a_start_that_was_refused_leaves_a_directory_in_which_another_can_begin(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("not like this")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_require_objective", refuse)
        with pytest.raises(UserError, match="not like this"):
            run(configure("loss=ppo", *ROLLOUTS[:-1], "train.eval_at_start=true"), [])
    assert run(configure("loss=ppo", *ROLLOUTS[:-1]), []) == 0


def test_a_base_that_was_changed_while_its_adapter_was_trained_is_not_merged(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, table = copied(world.base, tmp_path), "model.embed_tokens.weight"
    config = LlamaConfig.from_pretrained(base, vocab_size=4000, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(base)
    whole = Trainer._backward

    def change(self: Trainer, *given: Any) -> Any:
        weights = load_file(base / "model.safetensors")
        weights[table][1501] += 5.0  # a row that no probe reads
        save_file(weights, base / "model.safetensors", {"format": "pt"})
        return whole(self, *given)

    monkeypatch.setattr(Trainer, "_backward", change)
    overrides = [f"model.name_or_path={base}", "peft=lora", "peft.r=2", "train.steps=1"]
    assert run(compose(world.cache, world.place / "runs", *world.words("moving", *overrides)), []) == 1
    final = world.place / "runs" / "moving" / "FINAL"
    said = json.loads((final.parent / "result.json").read_text())["reason"]
    assert "the adapter could not be merged: UserError: this run was trained on " in said
    assert (final / "adapter").is_dir()
    assert not (final / "model.safetensors").exists()


# --- rollouts, values, coefficients


def test_what_was_known_of_other_rows_or_settings_is_not_taken_for_these(of_rollouts: Path) -> None:
    known = of_rollouts / "rollouts" / "train"
    before = {name: load_file(known / "rollouts.safetensors")[name] for name in ("old", "reference", "values")}
    overrides = ["data.train=[{path: arithmetic, split: 'train[48:84]'}]", "data.eval=[{path: arithmetic, split: 'eval[:6]'}]"]
    assert resume(of_rollouts, *overrides, "resume_changes=allow") == 0
    after = load_file(known / "rollouts.safetensors")
    assert all(after[name].shape != before[name].shape for name in before)
    assert "data or settings have changed: computed again, with the policy of step 2" in (of_rollouts / "train.log").read_text()


@pytest.mark.parametrize(("override", "anew"), [("train.temperature=0.5", True), ("loss.kl_coefficient=0", False)])
def test_what_was_known_under_other_settings_is_read_anew(override: str, anew: bool, of_rollouts: Path) -> None:
    """Without a KL the reference is not needed, and the old log-probs are those of the policy that began all the same."""
    before = (of_rollouts / "rollouts" / "train" / "rollouts.safetensors").read_bytes()
    assert resume(of_rollouts, override, "resume_changes=allow") == 0
    assert ((of_rollouts / "rollouts" / "train" / "rollouts.safetensors").read_bytes() != before) is anew


def test_where_what_was_known_is_gone_a_run_is_left_as_it_was(of_rollouts: Path) -> None:
    shutil.rmtree(of_rollouts / "rollouts" / "train")
    assert "is damaged or missing, and cannot be computed again" in refusal(of_rollouts)
    assert len(attempts(of_rollouts)) == 1


def test_a_coefficient_that_is_typed_anew_is_the_one_that_trains(of_rollouts: Path) -> None:
    assert resume(of_rollouts, "loss.kl_coefficient=0.9", "resume_changes=allow") == 0
    assert [row["kl_coefficient"] for row in rows(of_rollouts)] == pytest.approx([0.05, 0.05, 0.9, 0.9])


@pytest.mark.parametrize("place", ["FINAL", "checkpoints/step-00000002"])
def test_a_value_head_is_handed_over_with_its_policy(
    place: str, ppo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["halos.checkpoint", "export", str(ppo / place), "--output", str(tmp_path / "out")])
    assert cli.main() == 0
    one, other = (load_file(at / VALUE_HEAD / HEAD_FILE) for at in (ppo / place, tmp_path / "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_export_names_no_place_of_the_machine_but_its_data(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["halos.checkpoint", "export", str(finished / "FINAL"), "--output", str(tmp_path / "out")])
    assert cli.main() == 0
    assert str(finished) not in (tmp_path / "out" / "manifest.json").read_text()


# --- what is looked at


def test_verify_looks_at_rollouts_and_at_what_was_set_aside(
    of_rollouts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    aside = of_rollouts / "checkpoints" / "superseded-001" / "step-00000002"
    shutil.copytree(of_rollouts / "checkpoints" / "step-00000002", aside)
    damaged = [of_rollouts / "rollouts" / "train" / "rollouts.safetensors", aside / "model" / "model.safetensors"]
    for path in damaged:
        flip(path)
    monkeypatch.setattr(sys, "argv", ["halos.checkpoint", "verify", str(of_rollouts)])
    assert cli.main() == 1
    said = capsys.readouterr().out
    assert all(f"{path.relative_to(of_rollouts)}: contents changed\n" in said for path in damaged)


@pytest.mark.parametrize("left", ["", '{"for'])
def test_a_manifest_that_was_emptied_or_cut_off_is_damage(left: str, world: World, finished: Path) -> None:
    (finished / "FINAL" / "manifest.json").write_text(left)
    assert "is not what was saved there: manifest.json: unreadable" in world.refusal(
        "next", f"model.name_or_path={finished / 'FINAL'}"
    )


def test_a_size_in_digits_that_are_no_number_is_one_message(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["export", str(finished / "FINAL"), "--output", str(tmp_path / "out"), "--max-shard-size", "²MB"]
    monkeypatch.setattr(sys, "argv", ["halos.checkpoint", *overrides])
    assert cli.main() == 2
    assert "'²MB' is no size" in capsys.readouterr().err
