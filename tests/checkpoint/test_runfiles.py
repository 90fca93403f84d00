"""config.yaml and the other small files are sealed too: a changed byte is detected, and a changed value refused by name."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from world import World, attempts, copied, refusal, resume

from halos import seals
from halos.checkpoint import __main__ as cli
from halos.checkpoint import manifest, runfiles
from halos.cli import resume as resuming
from halos.config.arithmetic_version import CISPO_BOUNDED_BELOW
from halos.errors import UserError
from halos.rundir import RunDir

SEALED = ["config.yaml", "attempts/000.yaml", "metrics.jsonl", "result.json", "checkpoints.jsonl"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> World:
    made = World(tmp_path_factory.mktemp("world"), cache)
    made.train("run", "loss=sft", "train.log_every=1")
    return made


@pytest.fixture
def finished(world: World, tmp_path: Path) -> Path:
    return copied(world.place / "runs" / "run", tmp_path)


@pytest.fixture
def directory(finished: Path) -> Path:
    """Of a run that is to go on from step 2."""
    shutil.rmtree(finished / "FINAL")
    shutil.rmtree(finished / "checkpoints" / "step-00000004")
    return finished


def flipped(path: Path, at: int) -> bytes:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << at % 7
    return bytes(content)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def parsed(content: bytes) -> object:
    try:
        return yaml.safe_load(content.decode())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError):
        return None


def test_every_flip_in_a_configuration_that_changes_a_value_is_refused(directory: Path) -> None:
    run, path = RunDir(directory), directory / "config.yaml"
    content, taken, changed = path.read_bytes(), [], 0
    before = yaml.safe_load(content)
    place = ("exp_name", "output_root", "run_dir", "cache_dir", "resume", "resume_changes", "overwrite", "plugins", "dry_run",
             "dry_run_rows")  # fmt: skip
    for at in range(0, len(content), 23):
        path.write_bytes(flipped(path, at))
        now = parsed(path.read_bytes())
        if not isinstance(now, dict) or {**now, **dict.fromkeys(place)} != {**before, **dict.fromkeys(place)}:
            changed += 1
            try:
                resuming.last_settings(run)
                taken += [at] if not runfiles.changed(run) else []
            except UserError:
                pass
        path.write_bytes(content)
    assert (taken, changed > 40) == ([], True)


def test_a_value_that_was_changed_by_hand_is_named_and_may_be_allowed(directory: Path) -> None:
    edit(directory / "config.yaml", "batch_size: 8", "batch_size: 6")
    edit(directory / "config.yaml", "log_every: 1", "log_every: 2")
    said = refusal(directory)
    assert "train.batch_size 8 -> 6" in said
    where = directory / "checkpoints" / "step-00000002"
    assert f"train.log_every 1 -> 2 (the first is sealed in {where}; config.yaml: contents changed)" in said
    assert resume(directory, "resume_changes=allow") == 0
    assert attempts(directory)[1]["changed"] == {"train.batch_size": [8, 6], "train.log_every": [1, 2]}
    for name in ("step-00000004", "step-00000002"):  # sealed with the new values, and with the old
        shutil.rmtree(directory / "FINAL")
        assert resume(directory) == 0
        shutil.rmtree(directory / "checkpoints" / name)
    assert "changed" not in attempts(directory)[2]


def test_a_checkpoint_whose_own_seal_is_broken_says_nothing_of_the_configuration(finished: Path) -> None:
    shutil.rmtree(finished / "FINAL")
    for name, value in (("config.yaml", "batch_size: "), ("checkpoints/step-00000004/lineage.json", '"batch_size": ')):
        edit(finished / name, f"{value}8", f"{value}6")
    run = RunDir(finished)
    [change] = runfiles.changed(run)
    assert (change.key, change.old, change.new) == ("train.batch_size", 8, 6)
    assert "step-00000002" in (change.why or "")
    assert resuming.edited_files(run, []) == [change]
    assert resuming.edited_files(run, [replace(change, old=6, new=5)]) == [], "overridden keys are recorded already"


def test_a_change_that_a_start_recorded_is_sealed_with_it(directory: Path) -> None:
    assert resume(directory, "train.log_every=3") == 0
    shutil.rmtree(directory / "FINAL")
    assert runfiles.changed(RunDir(directory)) == []
    edit(directory / "attempts" / "001.yaml", "- 3\n", "- 2\n")
    assert "train.log_every 3 -> 2" in refusal(directory)


def assert_other_rows_are_refused(directory: Path, world: World) -> None:
    rows = world.data.read_text()
    try:
        world.data.write_text(rows.replace("one", "two"))
        assert f"data.train {world.data} (content)" in refusal(directory)
    finally:
        world.data.write_text(rows)


def test_of_a_damaged_record_nothing_is_taken_and_the_newest_checkpoint_says_what_there_was(
    directory: Path, world: World
) -> None:
    path = directory / "attempts" / "000.yaml"
    path.write_text(re.sub(r"(data.train|model.weights): [0-9a-f]{64}", rf"\1: {'f' * 64}", path.read_text()))
    assert_other_rows_are_refused(directory, world)
    assert resume(directory) == 0
    assert "content_changed" not in attempts(directory)[1]


def test_before_the_first_checkpoint_the_file_is_named(directory: Path) -> None:
    shutil.rmtree(directory / "checkpoints")
    (directory / "checkpoints.jsonl").unlink()
    run = RunDir(directory)
    assert runfiles.changed(run) == []
    edit(directory / "config.yaml", "batch_size: 8", "batch_size: 6")
    assert [change.key for change in runfiles.changed(run)] == ["config.yaml (content)"]
    assert "config.yaml (content)" in refusal(directory)
    assert resume(directory, "resume_changes=allow") == 0
    assert attempts(directory)[1]["content_changed"].keys() == {"config.yaml (content)"}


@pytest.mark.parametrize("text", ["changed: {}\n", "sealed: [1]\n", "- 1\n"])
def test_a_seal_under_what_is_no_record_makes_it_none(text: str, directory: Path) -> None:
    first = (directory / "attempts" / "000.yaml").read_text()
    assert seals.faults((directory / "config.yaml").read_text(), {"0": first, "1": seals.seal(text)}) == {"1": seals.CHANGED}


def unsealed(directory: Path) -> None:
    """Make the run one of an older version: without seals and hashes."""
    for path in (directory / "attempts").glob("*.yaml"):
        record = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({key: value for key, value in record.items()
                                        if key not in ("sealed", "seal", "content", "sources")}, sort_keys=False))  # fmt: skip
    for path in directory.rglob("lineage.json"):
        chain = json.loads(path.read_text())
        del chain["runs"][-1]["content"], chain["runs"][-1]["result"]["record"]
        path.write_text(json.dumps(chain))
        (path.parent / "manifest.json").write_text(manifest.describe(path.parent, {"step": chain["runs"][-1]["result"]["step"]}))
    (directory / "checkpoints.jsonl").unlink(missing_ok=True)


def test_an_older_run_goes_on_and_is_compared_with_what_its_checkpoints_seal(
    directory: Path, world: World, tmp_path: Path
) -> None:
    unsealed(directory)
    edit(directory / "config.yaml", "batch_size: 8", "batch_size: 6")
    assert "train.batch_size 8 -> 6" in refusal(directory)
    edit(directory / "config.yaml", "batch_size: 6", "batch_size: 8")
    assert_other_rows_are_refused(directory, world)
    assert resume(directory) == 0
    assert seals.is_whole((directory / "attempts" / "001.yaml").read_text())
    assert attempts(directory)[1]["content"]["model.weights"]


# --- verify


def verified(directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    capsys.readouterr()
    status = cli.verify(directory)
    return status, dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


def test_verify_looks_at_everything_and_names_what_has_changed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = verified(finished, capsys)
    assert status == 0, said
    assert {*SEALED, "FINAL/model.safetensors", "step-00000002/model/model.safetensors"} <= said.keys()
    assert {name: each for name, each in said.items() if not each.startswith("ok")} == {}
    for name in SEALED:
        path = finished / name
        content = path.read_bytes()
        for at in range(3, len(content) - 1, max(1, len(content) // 12)):
            path.write_bytes(flipped(path, at))
            status, said = verified(finished, capsys)
            assert (status, said[name].startswith("ok")) == (1, False), (name, at)
            path.write_bytes(content)


def test_verify_finds_a_line_of_metrics_that_is_gone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = finished / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert re.fullmatch(r"\d lines instead of \d", verified(finished, capsys)[1]["metrics.jsonl"])


def test_a_damaged_result_is_none(finished: Path) -> None:
    run = RunDir(finished)
    assert run.is_finished()
    edit(finished / "result.json", '"step": 4', '"step": 5')
    assert run.read_result() is None


@pytest.mark.parametrize("record", ["nonsense", [1], {"attempt": "0", "metrics": {"rows": "2"}}, {"attempt": None, "metrics": 7}])
def test_a_save_that_says_nonsense_of_what_it_came_after_says_nothing(
    record: object, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = directory / "checkpoints" / "step-00000002"
    chain = json.loads((path / "lineage.json").read_text())
    chain["runs"][-1]["result"]["record"] = record
    (path / "lineage.json").write_text(json.dumps(chain))
    (path / "manifest.json").write_text(manifest.describe(path, {"step": 2}))
    assert runfiles.changed(RunDir(directory)) == []
    assert "none is under a seal" in verified(directory, capsys)[1]["metrics.jsonl"]


@pytest.mark.parametrize("version", [CISPO_BOUNDED_BELOW - 1, CISPO_BOUNDED_BELOW])
def test_a_key_that_a_run_did_not_read_when_it_began_is_not_taken_for_changed(version: int, directory: Path) -> None:
    loss = {"_target_": "halos.losses.grpo.grpo", "objective": "cispo", "clip_low": 0.2}
    record, path = directory / "attempts" / "000.yaml", directory / "checkpoints" / "step-00000002"
    (directory / "config.yaml").write_text(
        yaml.safe_dump(yaml.safe_load((directory / "config.yaml").read_text()) | {"loss": loss})
    )
    record.write_text(re.sub(r"arithmetic: \S+", f"arithmetic: {version}", record.read_text()))
    chain = json.loads((path / "lineage.json").read_text())
    chain["runs"][-1]["config"]["loss"], chain["runs"][-1]["content"]["arithmetic"] = loss, version
    (path / "lineage.json").write_text(json.dumps(chain))
    (path / "manifest.json").write_text(manifest.describe(path, {"step": 2}))
    assert resuming.last_settings(RunDir(directory))["loss"]["clip_low"] == (0.2 if version == CISPO_BOUNDED_BELOW else None)
    assert [change.key for change in runfiles.changed(RunDir(directory)) if change.key.startswith("loss.clip")] == []


def test_verify_looks_into_every_round_and_at_the_last_policy_whatever_was_deleted_or_is_not_there_yet(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, earlier := finished / "rounds" / "000" / "train", ignore=shutil.ignore_patterns("rounds"))
    shutil.copytree(earlier, finished / "rounds" / "001" / "train")
    begun = shutil.copytree(earlier, finished / "rounds" / "002" / "train")
    for place in (earlier / "FINAL", earlier / "checkpoints", finished / "checkpoints", *begun.iterdir()):
        if place.name != "config.yaml":
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    (begun / "attempts").mkdir()
    status, said = verified(finished, capsys)
    assert status == 0, said
    weights = ["rounds/001/train/FINAL/model.safetensors", "rounds/001/train/step-00000004/model/model.safetensors",
               "FINAL/model.safetensors"]  # fmt: skip
    assert {*weights, "rounds/000/train/metrics.jsonl", "rounds/002/train/config.yaml"} <= said.keys()
    for name in ("FINAL", "rounds/001/train/FINAL"):
        content = (path := finished / name / "model.safetensors").read_bytes()
        path.write_bytes(flipped(path, 900))
        status, said = verified(finished, capsys)
        assert (status, said[f"{name}/model.safetensors"].startswith("ok")) == (1, False)
        path.write_bytes(content)
    shutil.rmtree(finished / "FINAL")
    assert verified(finished, capsys)[0] == 0, "its rounds go on"
