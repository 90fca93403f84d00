"""python -m halos.checkpoint, as a user runs it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from halos.checkpoint import __main__ as cli
from halos.checkpoint import manifest
from halos.config.schema import Config
from halos.run.lifecycle import run


def typed(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    monkeypatch.setattr(sys, "argv", ["halos.checkpoint", *overrides])
    return cli.main()


def test_a_run_is_listed_verified_and_merged_at_any_step(
    configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["loss=dpo", "peft=lora", "train.steps=4", "train.batch_size=8", "checkpoint.every=2", "optim.lr=1e-3"]
    assert run(configure(*overrides), []) == 0
    place = str(tmp_path / "run")
    assert typed(monkeypatch, "ls", place) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("step-00000002", "step-00000004", "FINAL", "whole", "rewards/margins"))
    assert typed(monkeypatch, "verify", place) == 0
    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert typed(monkeypatch, "merge", str(last), "--output", str(tmp_path / "merged")) == 0
    assert manifest.verify(tmp_path / "merged") == []
    merged, final = ((path / "model.safetensors").read_bytes() for path in (tmp_path / "merged", tmp_path / "run" / "FINAL"))
    assert merged == final
    (last / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert typed(monkeypatch, "verify", place) == 1
    assert "step-00000004/adapter/adapter_model.safetensors: 0 bytes instead of" in capsys.readouterr().out


def test_an_evaluation_of_another_step_is_listed_with_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4):
        saved = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        saved.mkdir(parents=True)
        (saved / "metrics.json").write_text(json.dumps({"step": step, "eval": {"step": 2, "loss": 0.5}}))
        (saved / manifest.NAME).write_text(manifest.describe(saved, {}))
    assert typed(monkeypatch, "ls", str(tmp_path / "run")) == 0
    own, other = capsys.readouterr().out.splitlines()
    assert own.endswith("  loss 0.5")
    assert "evaluation" not in own
    assert other.endswith("  evaluation of step 2:  loss 0.5")


def test_a_checkpoint_of_a_newer_version_is_named_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "run" / "checkpoints" / "step-00000001"
    saved.mkdir(parents=True)
    text = manifest.describe(saved, {}).replace(f'"format": {manifest.FORMAT}', '"format": 99').rpartition(manifest.SEAL)[0]
    (saved / manifest.NAME).write_text(manifest.seal(text + "\n}"))
    assert typed(monkeypatch, "ls", str(tmp_path / "run")) == 0
    assert "NEWER" in capsys.readouterr().out
    assert typed(monkeypatch, "verify", str(tmp_path / "run")) == 2
    assert "format 99" in capsys.readouterr().err


@pytest.mark.parametrize("overrides", [["ls", "{}"], ["merge", "{}", "--output", "{}/out"]])
def test_what_is_no_checkpoint_is_one_message(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, *(word.format(tmp_path) for word in overrides)) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['x', '--help']\nfrom halos.checkpoint import __main__ as m\n" \
        "try: m.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
