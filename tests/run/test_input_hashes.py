"""A resumed run has the same inputs by content: changes are refused by name, files that only moved are accepted."""

import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import compose
from safetensors.torch import load_file, save_file
from world import TEMPLATE, World, attempts, copied, final, pairs, refusal, resume, stopped

from halos.checkpoint import lineage, manifest, select
from halos.config import arithmetic_version
from halos.config.content_hashes import ContentHashes
from halos.config.plugins import code_hash
from halos.distributed.signals import STOPPED
from halos.models.load import load_tokenizer
from halos.rollout.scorers.function import Functions
from halos.run import assemble, input_hashes
from halos.run.lifecycle import run
from halos.rundir import RunDir
from halos.sweep.job import Job


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> World:
    world = World(tmp_path_factory.mktemp("world"), cache)
    world.begin("lora", "peft=lora", "peft.r=2")
    world.begin("full")
    return world


# --- what is hashed


def test_each_hash_changes_with_the_file_that_its_key_names_and_with_no_other(world: World, tmp_path: Path) -> None:
    base, reference, scorer = (copied(world.base, tmp_path / name) for name in ("policy", "reference", "scorer"))
    adapter = copied(world.place / "runs" / "lora" / "checkpoints" / "step-00000002" / "adapter", tmp_path)
    (tmp_path / "rubric.md").write_text("Prefer the shorter.")
    config: Any = compose(world.cache, tmp_path, *world.words("x"))
    config.peft.name, config.peft.init_from = "lora", str(adapter)
    config.online = SimpleNamespace(scorer=SimpleNamespace(name="reward_model", model=str(scorer)))

    def read(*added: str) -> Mapping[str, str | None]:
        tokenizer, _ = load_tokenizer(base, add_tokens=[*added])
        return input_hashes.read(config, tokenizer, {}, base=base, reference=reference).hashes

    def differing(*added: str) -> set[str]:
        now = read(*added)
        assert now.keys() == before.keys()
        return {key for key, value in now.items() if value != before[key]}

    before = read()
    changes = {
        base / "model.safetensors": "model.weights", reference / "model.safetensors": "reference.weights",
        base / "generation_config.json": "model.generation_config.json", base / "tokenizer_config.json": "model.tokenizer",
        reference / "config.json": "reference.config.json", scorer / "model.safetensors": "online.scorer.model",
        scorer / "tokenizer_config.json": "online.scorer.model.tokenizer",
        scorer / "config.json": "online.scorer.model.config.json",
        scorer / "chat_template.jinja": "online.scorer.model.chat_template",
        adapter / "adapter_model.safetensors": "peft.init_from",
    }  # fmt: skip
    assert differing() == set()
    assert differing("<|new|>") == {"model.tokenizer"}
    for path, key in changes.items():
        content = path.read_bytes()
        settings = {"eos_token": "<|user|>", "top_k": 7} if path.suffix == ".json" else {}
        path.write_bytes(json.dumps({**json.loads(content), **settings}).encode() if settings else content[:-1] + b"!")
        assert differing() == {key}, path
        path.write_bytes(content)
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_version": "4", "_name_or_path": "elsewhere"}))
    assert differing() == set()
    config.online.scorer = SimpleNamespace(name="judge", model="a name", rubric=str(tmp_path / "rubric.md"))
    before = read()
    (tmp_path / "rubric.md").write_text("Prefer the longer.")
    assert differing() == {"online.scorer.rubric"}


def test_a_run_without_recorded_hashes_has_those_of_its_newest_checkpoint(tmp_path: Path) -> None:
    directory = RunDir(tmp_path)
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "000.yaml").write_text("overrides: []\n")
    assert input_hashes.recorded(directory) is None
    for step in (2, 4):
        sections = {key: {} for key in ("model", "train", "optim", "schedule", "peft", "loss")}
        runs = [{"base": {"name": "b", "sha256": f"{name}{step}"}, "loss": "dpo", "result": {}, "config": sections, "data": {}}
                for name in ("first", "last")]  # fmt: skip
        path = directory.checkpoints / select.name_of(step)
        path.mkdir(parents=True)
        (path / lineage.NAME).write_text(json.dumps({"format": 1, "runs": runs}))
        (path / manifest.NAME).write_text(manifest.describe(path, {"step": step}))
    known = input_hashes.recorded(directory)
    assert known is not None
    assert known.hashes == {"model.weights": "last4"}


def test_the_arithmetic_version_of_a_run_is_that_of_its_newest_start_else_of_its_newest_checkpoint(tmp_path: Path) -> None:
    directory = RunDir(tmp_path)
    assert input_hashes._computed_with(directory, None) == 0
    for step, number in ((2, 3), (4, 5)):
        path = directory.checkpoints / select.name_of(step)
        path.mkdir(parents=True)
        (path / manifest.NAME).write_text(manifest.describe(path, {"step": step, "arithmetic": number}))
    assert input_hashes._computed_with(directory, ContentHashes({"model.weights": "w"})) == 5
    assert input_hashes._computed_with(directory, ContentHashes({"arithmetic": "4"})) == 4
    (path / manifest.NAME).write_text("{")
    assert input_hashes._computed_with(directory, None) == 3


def test_a_start_that_was_stopped_while_its_model_loaded_starts_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    config = compose(world.cache, world.place / "runs", *world.words("terminated", "train.precision=bfloat16"))
    directory = Path(config.run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(assemble, "_load", terminated)
        assert run(config, []) == STOPPED
    assert attempts(directory) == []
    assert resume(directory) == 0
    assert final(directory) == final(world.train("not_terminated", "train.precision=bfloat16"))


def test_a_run_of_a_version_that_recorded_no_starts_is_compared(world: World) -> None:
    directory = world.begin("unrecorded", "train.precision=bfloat16")
    for path in directory.glob("attempts/*"):
        path.unlink()
    for path in directory.glob("checkpoints/*/manifest.json"):
        (path.parent / lineage.NAME).unlink()
        path.write_text(manifest.describe(path.parent, {"step": 2}))
    (directory / "checkpoints.jsonl").unlink()
    assert f"arithmetic 0 -> {arithmetic_version.VERSION}" in refusal(directory)


HINGE = """
from torch import relu
from {package}.margins import MARGIN
from halos.losses.common import pair_metrics
from halos.types import Loss, Pair


def hinge(policy: Pair, reference: Pair, *, beta: float) -> Loss:
    chosen, rejected = beta * policy.chosen.sum, beta * policy.rejected.sum
    return Loss(relu(MARGIN - (chosen - rejected)), pair_metrics(policy, chosen, rejected))


def brief(completion, row):
    return MARGIN
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's package with a loss, a reward function, and a module that both import."""
    place = tmp_path / "ownloss"
    place.mkdir()
    for name, text in {
        "__init__": "",
        "margins": "MARGIN = 1.0\n",
        "unused": "\n",
        "hinge": HINGE.format(package="ownloss"),
    }.items():
        (place / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield place
    forget()


def forget() -> None:
    """Unload the package, as in a new process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "ownloss"]:
        del sys.modules[name]


def test_the_hash_of_user_code_covers_what_it_imports_of_its_package(package: Path) -> None:
    scorer: Any = SimpleNamespace(functions=["ownloss.hinge.brief"])

    def read() -> tuple[str | None, str | None]:
        forget()
        reward = Functions.code(scorer, plugins=["ownloss"])["functions"]
        return reward, code_hash("ownloss.hinge.hinge")

    before = read()
    assert None not in before
    (package / "unused.py").write_text("import os\n")
    assert read() == before
    (package / "margins.py").write_text("MARGIN = 2.0\n")
    assert all(one != other for one, other in zip(read(), before, strict=True))
    assert code_hash("halos.losses.dpo.dpo") is None, "of ours"


def test_an_edited_loss_of_the_users_is_refused_by_name(world: World, package: Path) -> None:
    directory = world.begin("own", "loss._target_=ownloss.hinge.hinge", "plugins=[ownloss]")
    (package / "margins.py").write_text("MARGIN = 2.0\n")
    forget()
    assert "loss._target_ ownloss.hinge.hinge (content) " in refusal(directory, "plugins=[ownloss]")
    assert resume(directory, "plugins=[ownloss]", "resume_changes=allow") == 0


def test_a_finished_run_of_other_code_is_not_taken_for_the_one_that_is_asked_for(world: World, package: Path) -> None:
    directory = world.train("own_finished", "loss._target_=ownloss.hinge.hinge", "plugins=[ownloss]")
    job = Job(0, ("loss._target_=ownloss.hinge.hinge",), "", directory, directory.with_suffix(".log"))
    assert resume(directory, "plugins=[ownloss]") == 0
    assert not job.is_done(), "its process is asked"
    assert dataclasses.replace(job, path=world.train("built_in_finished")).is_done()
    (package / "margins.py").write_text("MARGIN = 2.0\n")
    forget()
    message = refusal(directory, "plugins=[ownloss]")
    assert message.startswith(
        f"{directory} is finished, and was trained with other code: loss._target_ ownloss.hinge.hinge (content)"
    )
    assert "give a new exp_name, or overwrite=true" in message
    assert resume(directory, "plugins=[ownloss]", "resume_changes=allow") == 0
    assert len(attempts(directory)) == 1, "it was not trained again"


# --- what has changed


def reversed_rows(world: World) -> None:
    world.data.write_text("\n".join(pairs(24)[::-1]))


def cut_rows(world: World) -> None:
    world.data.write_text("\n".join(pairs(23)))


def other_rows(world: World) -> None:
    world.data.write_text("\n".join(pairs(24, "never")))


def other_eval_data(world: World) -> None:
    world.eval_data.write_text("\n".join(pairs(8, "never")))


def scaled_weights(world: World) -> None:
    path = world.base / "model.safetensors"
    save_file({name: value * 1.3 for name, value in load_file(path).items()}, path, {"format": "pt"})


def other_settings(world: World) -> None:
    path = world.base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-2}))


def other_template(world: World) -> None:
    world.template.write_text(TEMPLATE.replace("assistant: ", "assistant  "))


def other_tokenizer(world: World) -> None:
    path = world.base / "tokenizer.json"
    path.write_text(path.read_text().replace('"ignore_merges": true', '"ignore_merges": false'))


CHANGED = [
    (reversed_rows, "data.train {}/s.jsonl (content)"),
    (cut_rows, "data.train {}/s.jsonl (content)"),
    (other_rows, "data.train {}/s.jsonl (content)"),
    (other_eval_data, "data.eval {}/e.jsonl (content)"),
    (scaled_weights, "model.weights {}/base (content)"),
    (other_settings, "model.config.json {}/base (content)"),
    (other_template, "model.chat_template {}/t.jinja (content)"),
    (other_tokenizer, "model.tokenizer {}/base (content)"),
]


@pytest.fixture
def restored(world: World) -> object:
    """Restore the files that a test changes."""
    files = [world.data, world.eval_data, world.template, *(path for path in world.base.iterdir() if path.is_file())]
    before = {path: path.read_bytes() for path in files}
    yield
    for path, content in before.items():
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("change", "named"), CHANGED, ids=lambda part: part.__name__ if callable(part) else "")
def test_a_changed_input_is_refused_by_name(
    change: Callable[[World], None], named: str, kind: str, world: World, restored: object
) -> None:
    directory = world.place / "runs" / kind
    change(world)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert named.format(world.place) in refusal(directory)
    assert named.format(world.place) in refusal(directory, "dry_run=true")
    assert {path: path.read_bytes() for path in before} == before


def test_an_allowed_change_is_recorded_and_accepted_from_then_on(world: World, restored: object, tmp_path: Path) -> None:
    directory = copied(world.place / "runs" / "full", tmp_path)
    other_rows(world)
    assert resume(directory, "resume_changes=allow") == 0
    [key] = attempts(directory)[1]["content_changed"]
    assert key == f"data.train {world.data} (content)"
    assert "CHANGED WHAT THE RUN COMPUTES, from step 2 on: data.train" in (directory / "train.log").read_text()
    shutil.rmtree(directory / "FINAL")
    assert resume(directory) == 0
    assert "content_changed" not in attempts(directory)[2]


def test_the_same_rows_in_another_formatting_are_accepted(world: World, restored: object, tmp_path: Path) -> None:
    directory = copied(world.place / "runs" / "full", tmp_path)
    world.data.write_text("\n".join(line.replace('": "', '" :  "') for line in pairs(24)) + "\n\n")
    assert resume(directory) == 0


def test_inputs_that_only_moved_are_accepted(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = World.__new__(World)
    moved.place = tmp_path / "elsewhere"
    shutil.copytree(world.place, moved.place)
    for name in ("base", "s.jsonl", "e.jsonl", "t.jinja"):
        (moved.place / name).rename(moved.place / f"new-{name}")
    monkeypatch.chdir(tmp_path)
    directory = moved.place / "runs" / "lora"
    words = ["model.name_or_path=elsewhere/new-base", "data.train=[elsewhere/new-s.jsonl]", "data.eval=[elsewhere/new-e.jsonl]",
             "model.chat_template=elsewhere/new-t.jinja"]  # fmt: skip
    assert resume(directory, *words) == 0
    assert attempts(directory)[1]["changed"]["model.name_or_path"][1] == str(moved.place / "new-base")
    assert "content_changed" not in attempts(directory)[1]
    assert "CHANGED" not in (directory / "train.log").read_text()


def test_a_relative_path_leads_to_the_same_files_from_another_directory(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.place)
    words = ["model.name_or_path=base", "model.chat_template=t.jinja", "data.train=[{path: s.jsonl}]", "data.eval=[e.jsonl]"]
    config = compose(world.cache, tmp_path, *world.words("run", *words))
    assert run(config, []) == 0
    directory = stopped(tmp_path / "run")
    for name in ("s.jsonl", "e.jsonl", "t.jinja"):
        (tmp_path / name).write_text("other")  # where the relative paths lead from here
    monkeypatch.chdir(tmp_path)
    assert resume(directory) == 0
    settings = yaml.safe_load((directory / "config.yaml").read_text())
    defaults = {"root": None, "score": "last", "format": None, "reader": None, "columns": {}, "filter": None, "schemas": True,
                "eval_fraction": None, "near_duplicates": 0.8, "stream": False, "stream_block": 20000, "weights": "share",
                "lost": "error", "system": "keep", "chat_template_kwargs": {}, "date": None}  # fmt: skip
    assert settings["data"] | {"root": None} == {"train": [{"path": str(world.data)}], "eval": [str(world.eval_data)], **defaults}
    assert settings["model"]["name_or_path"] == str(world.base)


def test_optim_init_from_is_compared_by_content(world: World, tmp_path: Path) -> None:
    first, other = (copied(world.begin(name, f"seed={seed}"), tmp_path) for seed, name in enumerate(("first", "other")))
    directory = world.begin("warm", f"optim.init_from={first}/checkpoints/step-00000002")
    first.rename(tmp_path / "moved")
    word = "optim.init_from={}/checkpoints/step-00000002"
    assert f"optim.init_from {other}/checkpoints/step-00000002 (content)" in refusal(directory, word.format(other))
    assert resume(copied(directory, tmp_path / "a"), word.format(tmp_path / "moved")) == 0
    assert resume(copied(directory, tmp_path / "b")) == 0  # its own checkpoint has its own optimizer
    shutil.rmtree(directory / "checkpoints")
    (directory / "checkpoints.jsonl").unlink()
    for more in ([], ["dry_run=true"]):
        assert f"optim.init_from: {first}/checkpoints/step-00000002 is no checkpoint" in refusal(directory, *more)
