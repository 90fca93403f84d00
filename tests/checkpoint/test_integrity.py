"""What a run saved is checked wherever it is used; files without a manifest are used unchecked."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from world import World, copied, refusal, resume

from halos import hashes
from halos.checkpoint import integrity, lineage, manifest
from halos.config.defaults import section
from halos.config.schema import Scorer
from halos.errors import UserError
from halos.export import export
from halos.online import sample
from halos.rollout.scorers.reward_model import RewardModel
from halos.rundir import RunDir


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> World:
    made = World(tmp_path_factory.mktemp("world"), cache)
    made.train("sft", "loss=sft", "peft=lora", "peft.r=2", "train.steps=2")
    return made


@pytest.fixture
def final(world: World, tmp_path: Path) -> Path:
    return copied(world.place / "runs" / "sft" / "FINAL", tmp_path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def sampled(world: World, model: Path) -> None:
    (world.place / "p.jsonl").write_text(json.dumps({"prompt": "Count"}))
    overrides = [str(model), "--data", str(world.place / "p.jsonl"), "--output", str(world.place / "out.jsonl")]
    sample.run(sample.parser().parse_args([*overrides, "--cache-dir", str(world.cache)]))


USES: list[Callable[[World, Path], object]] = [
    lambda world, final: world.refusal("next", f"model.name_or_path={final}"),
    lambda world, final: world.refusal("next", f"reference.name_or_path={final}", "dry_run=true"),
    lambda world, final: sampled(world, final),
    lambda world, final: RewardModel(final, section(Scorer, batch_size=1), max_length=None, quiet=True),
    lambda world, final: export.SavedModel.at(final),
]


@pytest.mark.parametrize("use", USES, ids=["policy", "reference", "sampler", "scorer", "export"])
def test_a_flipped_bit_of_a_model_is_refused_by_name(use: Callable[[World, Path], object], world: World, final: Path) -> None:
    flip(final / "model.safetensors")
    try:
        said = use(world, final)
    except UserError as error:
        said = str(error)
    assert "model.safetensors: contents changed" in str(said)
    assert str(final) in str(said)


def test_a_flipped_bit_of_an_adapter_is_refused_and_of_what_lies_beside_it_is_not(world: World, final: Path) -> None:
    flip(final / "model.safetensors")
    integrity.check(final / "adapter", "peft.init_from", world.cache)
    flip(final / "adapter" / "adapter_model.safetensors")
    said = world.refusal("next", "peft=lora", "peft.r=2", f"peft.init_from={final / 'adapter'}")
    assert f"peft.init_from={final / 'adapter'} is not what was saved there: adapter/adapter_model.safetensors" in said


@pytest.fixture(params=["link", "copy"])
def alone(request: pytest.FixtureRequest, final: Path, tmp_path: Path) -> Path:
    """The adapter of FINAL under another name."""
    path = tmp_path / "my_adapter"
    if request.param == "copy":
        return Path(shutil.copytree(final / "adapter", path))
    path.symlink_to(final / "adapter")
    return path


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "lineage.json"])
def test_an_adapter_that_is_reached_by_a_link_or_was_copied_is_checked(name: str, alone: Path, world: World) -> None:
    integrity.check(alone, "peft.init_from")
    flip(alone / name)
    said = world.refusal("next", "peft=lora", "peft.r=2", f"peft.init_from={alone}")
    assert f"peft.init_from={alone} is not what was saved there" in said
    assert f"{name}: contents changed" in said
    assert f"delete {alone.resolve() / 'manifest.json'}" in said or f"and {alone.resolve() / 'manifest.json'}" in said


def test_an_adapter_that_is_reached_by_a_link_or_was_copied_knows_its_base(alone: Path, world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other", world.cache)
    flip(other.base / "model.safetensors")
    words = ["peft=lora", "peft.r=2", f"peft.init_from={alone}", f"model.name_or_path={other.base}"]
    assert "it is another model or was changed since" in world.refusal("next", *words)
    with pytest.raises(UserError, match="it is another model or was changed since"):
        export.merged(alone, tmp_path / "out", base=other.base)
    assert lineage.of_adapter(alone) == lineage.read(alone.resolve())


def test_an_adapter_of_an_older_version_which_holds_no_lineage_is_checked_through_a_link_too(
    world: World, final: Path, tmp_path: Path
) -> None:
    for name in ("lineage.json", "manifest.json"):
        (final / "adapter" / name).unlink()
    (final / "manifest.json").write_text(manifest.describe(final, {}))
    (tmp_path / "link").symlink_to(final / "adapter")
    assert lineage.of_adapter(tmp_path / "link") == export.SavedModel.at(tmp_path / "link").lineage == lineage.read(final)
    flip(final / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter/adapter_model.safetensors: contents changed"):
        integrity.check(tmp_path / "link", "peft.init_from")


def test_a_copied_adapter_without_its_manifest_is_told_by_its_lineage(
    final: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = copied(final / "adapter", tmp_path)
    (alone / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        integrity.check(alone, "peft.init_from")
        assert not caplog.records
        flip(alone / "adapter_model.safetensors")
        integrity.check(alone, "peft.init_from")
    assert "not the weights that its lineage.json ends with" in caplog.text


@pytest.mark.parametrize("name", ["value_head/model.safetensors", "lineage.json"])
def test_what_goes_with_an_adapter_is_checked_with_it(name: str, final: Path) -> None:
    (final / "value_head").mkdir()
    shutil.copy(final / "adapter" / "adapter_model.safetensors", final / "value_head" / "model.safetensors")
    (final / "manifest.json").write_text(manifest.describe(final, {}))
    integrity.check(final / "adapter", "peft.init_from")
    flip(final / name)
    with pytest.raises(UserError, match=re.escape(f"{name}: contents changed")):
        integrity.check(final / "adapter", "peft.init_from")


def test_a_half_copied_model_is_refused(final: Path) -> None:
    (final / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json: missing"):
        integrity.check(final, "model.name_or_path")
    listing = final / "manifest.json"
    listing.write_bytes(listing.read_bytes()[: listing.stat().st_size // 2])
    with pytest.raises(UserError, match=r"manifest.json: unreadable"):
        integrity.check(final, "model.name_or_path")


def test_a_damaged_optimizer_is_not_begun_with(world: World, tmp_path: Path) -> None:
    checkpoint = copied(world.place / "runs" / "sft" / "checkpoints" / "step-00000002", tmp_path)
    flip(next(checkpoint.glob("state/optimizer/*.safetensors")))
    said = world.refusal("next", "peft=lora", "peft.r=2", f"optim.init_from={checkpoint}", "dry_run=true")
    assert f"optim.init_from={checkpoint / 'state'} is not what was saved there: state/optimizer/" in said


def test_a_finished_run_whose_model_is_damaged_says_so_and_makes_it_again(world: World, tmp_path: Path) -> None:
    directory = copied(world.place / "runs" / "sft", tmp_path)
    flip(directory / "FINAL" / "model.safetensors")
    said = refusal(directory)
    assert "its FINAL is not what was saved there (model.safetensors: contents changed)" in said
    assert f"writes it again from {directory / 'checkpoints' / 'step-00000002'}" in said
    shutil.rmtree(directory / "FINAL")
    assert resume(directory) == 0
    integrity.check_final(RunDir(directory))


def test_what_people_write_beside_a_model_is_no_damage(final: Path) -> None:
    (final / "README.md").write_text("My model.")
    (final / "notes.txt").write_text("Good at counting.")
    (final / ".DS_Store").write_bytes(b"\0")
    integrity.check(final, "model.name_or_path")
    shutil.copy(final / "model.safetensors", final / "model-2.safetensors")
    with pytest.raises(UserError, match=r"model-2.safetensors: not in the manifest"):
        integrity.check(final, "model.name_or_path")


def test_a_manifest_of_somebody_elses_is_none(world: World, tmp_path: Path) -> None:
    base = copied(world.base, tmp_path)
    (base / "manifest.json").write_text(json.dumps({"name": "my app", "files": ["index.html"]}))
    integrity.check(base, "model.name_or_path")


def test_weights_that_are_not_those_of_their_lineage_are_told(final: Path, caplog: pytest.LogCaptureFixture) -> None:
    (final / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        integrity.check(final, "model.name_or_path")
        assert not caplog.records
        flip(final / "model.safetensors")
        integrity.check(final, "model.name_or_path")
    assert "not the weights that its lineage.json ends with" in caplog.text


def test_weights_are_read_once_for_all_starts_and_again_when_anything_of_the_file_has_changed(
    final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    digest = hashes.digest
    monkeypatch.setattr(hashes, "digest", lambda path: read.append(path.name) or digest(path))
    monkeypatch.setattr(hashes, "SETTLED", 0.0)

    def start() -> str:
        read.clear()
        monkeypatch.setattr(hashes, "_cache", {})  # as in another process
        return lineage.identity(final, tmp_path / "cache")

    first = start()
    assert read == ["model.safetensors"]
    assert (start(), read) == (first, [])
    (final / "model.safetensors").rename(final / "other")
    shutil.copy2(final / "other", final / "model.safetensors")  # its name, size and time, and another file
    assert (start(), read) == (first, ["model.safetensors"])
    flip(final / "model.safetensors")
    assert start() != first


# --- an adapter that a run begins with


def begins(world: World, final: Path, *more: str) -> str:
    return world.refusal("next", "peft=lora", "peft.r=2", f"peft.init_from={final / 'adapter'}", *more)


def test_an_adapter_of_another_base_is_refused_by_content(world: World, final: Path, tmp_path: Path) -> None:
    other = World(tmp_path / "other", world.cache)
    flip(other.base / "model.safetensors")
    assert "it is another model or was changed since" in begins(world, final, f"model.name_or_path={other.base}")
    for name in ("lineage.json", "manifest.json"):  # as an adapter from elsewhere comes
        (final / name).unlink()
        (final / "adapter" / name).unlink()
    said = begins(world, final, f"model.name_or_path={other.base}")
    assert f"was trained on {world.base}, whose weights are not those of {other.base}" in said


def test_an_adapter_does_not_begin_on_a_base_with_another_config(world: World, final: Path, tmp_path: Path) -> None:
    base = copied(world.base, tmp_path)
    edited = {**json.loads((base / "config.json").read_text()), "rms_norm_eps": 0.5}
    (base / "config.json").write_text(json.dumps(edited))
    assert "rms_norm_eps 1e-06 -> 0.5" in begins(world, final, f"model.name_or_path={base}")


def swapped(token: re.Match[str]) -> str:
    return {'"<|end|>"': '"<|user|>"', '"<|user|>"': '"<|end|>"'}[token[0]]


def test_an_adapter_of_other_tokens_is_refused(world: World, final: Path) -> None:
    path = final / "tokenizer.json"
    (final / "manifest.json").unlink()
    whole = path.read_text()
    for other in (whole.replace('"<|end|>"', '"<|stop|>"'), re.sub(r'"<\|(end|user)\|>"', swapped, whole)):
        path.write_text(other)
        assert "was trained with another tokenizer" in begins(world, final)


def test_a_run_that_begins_with_an_adapter_keeps_the_chain_that_made_it(world: World, final: Path) -> None:
    directory = world.train("dpo", "peft=lora", "peft.r=2", f"peft.init_from={final / 'adapter'}", "train.steps=2")
    chain = lineage.read(directory / "FINAL")
    assert chain is not None
    first, second = chain["runs"]
    assert [first["loss"], second["loss"]] == ["sft", "dpo"]
    assert second["adapter"]["sha256"] == first["result"]["adapter"] == lineage.identity(final / "adapter")
    assert second["base"]["sha256"] == first["base"]["sha256"] == lineage.identity(world.base)
    assert "changed" not in second["base"]
