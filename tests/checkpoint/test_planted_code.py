"""A run directory from somebody else: resuming it runs no code that was planted in it."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from halos.checkpoint import manifest, select
from halos.config.schema import Config
from halos.errors import UserError
from halos.models.locate import locate
from halos.run.lifecycle import run
from halos.rundir import RunDir

FEW = ["loss=sft", "train.batch_size=8", "train.steps=4", "checkpoint.every=2", "optim.lr=1e-3", "train.eval_every=null"]


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def sealed(checkpoint: Path) -> None:
    """What was planted is listed, as a stranger would."""
    (checkpoint / "manifest.json").write_text(manifest.describe(checkpoint, {"step": 2, "world_size": 1}))
    assert manifest.verify(checkpoint) == []
    select.record_commit(RunDir(checkpoint.parents[1]), checkpoint)


def edited(path: Path, **facts: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that appears where a payload ran."""
    place = tmp_path / "pwned"
    pickle.loads(pickle.dumps(Payload(place)))
    assert place.exists(), "the payload works"
    place.unlink()
    return place


def begun(configure: Callable[..., Config], *overrides: str) -> tuple[Path, Path]:
    """A run with one checkpoint at step 2, and that checkpoint."""
    config = configure(*FEW, *overrides)
    assert run(config, []) == 0
    directory = Path(config.run_dir)
    shutil.rmtree(directory / "FINAL")
    shutil.rmtree(directory / "checkpoints" / "step-00000004")
    return directory, directory / "checkpoints" / "step-00000002"


AUTO = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}

PICKLES = ("state/evil.bin", "state/evil.pt", "state/.metadata", "state/optimizer/.metadata", "state/optimizer/__0_0.distcp",
           "tokenizer/vocab.pt", "training_args.bin")  # fmt: skip


@pytest.mark.parametrize("peft", [[], ["peft=lora"]], ids=["full", "lora"])
def test_planted_pickles_and_code_are_not_run(
    configure: Callable[..., Config], tmp_path: Path, mark: Path, peft: list[str]
) -> None:
    directory, checkpoint = begun(configure, *peft)
    bomb = pickle.dumps(Payload(mark))
    weights = "adapter" if peft else "model"
    for name in (*PICKLES, f"{weights}/pytorch_model.bin", f"{weights}/adapter_model.bin"):
        (checkpoint / name).write_bytes(bomb)
    (directory / "state.pt").write_bytes(bomb)
    for place in (checkpoint / weights, checkpoint / "tokenizer"):
        (place / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    edited(checkpoint / "tokenizer" / "tokenizer_config.json", auto_map=AUTO, trust_remote_code=True)
    if peft:
        mapping = {"base_model_class": "Evil", "parent_library": "evil"}
        edited(checkpoint / "adapter" / "adapter_config.json", auto_mapping=mapping, trust_remote_code=True)
    else:
        edited(checkpoint / "model" / "config.json", auto_map=AUTO, trust_remote_code=True)
    sealed(checkpoint)
    assert train.start([f"resume={directory}"]) == 0
    assert "resuming from checkpoints/step-00000002" in (directory / "train.log").read_text()
    assert not mark.exists()


def test_weights_that_are_only_there_as_a_pickle_are_refused(
    configure: Callable[..., Config], tmp_path: Path, mark: Path
) -> None:
    directory, checkpoint = begun(configure)
    (checkpoint / "model" / "model.safetensors").unlink()
    (checkpoint / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    sealed(checkpoint)
    with pytest.raises(UserError, match="could not be loaded"):
        train.start([f"resume={directory}"])
    assert not mark.exists()


@pytest.mark.parametrize("what", ["model", "tokenizer", "unknown model"])
def test_a_base_model_that_lies_in_the_run_runs_none_of_its_code(
    configure: Callable[..., Config], cache: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    directory, _ = begun(configure)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # a user who answers yes to whatever is asked
    planted = directory / "base"
    shutil.copytree(locate("tiny", None, cache), planted)
    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        (planted / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass {name}: ...")
    edited(planted / "tokenizer_config.json", **({"auto_map": AUTO, "tokenizer_class": "Evil"} if what == "tokenizer" else {}))
    kind = {"model_type": "evil"} if what == "unknown model" else {}
    edited(planted / "config.json", **({"auto_map": AUTO, **kind} if what != "tokenizer" else {}))
    config = directory / "config.yaml"
    config.write_text(config.read_text().replace("name_or_path: tiny", f"name_or_path: {planted}", 1))
    try:
        assert train.start([f"resume={directory}"]) == 0
    except UserError as error:
        assert str(planted) in str(error)  # noqa: PT017  either way is right
    assert not mark.exists()
