"""What is read of an accelerate config's DeepSpeed part, and refused before anything loads. That its engine trains and resumes
as everything else does is in tests/launch."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from halos import zero
from halos.errors import UserError


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero, "find_spec", lambda name: ModuleSpec(name, None))


def given(monkeypatch: pytest.MonkeyPatch, place: Path, **parts: object) -> None:
    file = place / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, **parts}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"zero_optimization": {"stage": 0}}, "ZeRO stage 0: there are 1, 2 and 3, or use launch/accelerate/fsdp2.yaml"),
        ({"fp16": {"enabled": True}}, "asks for fp16, whose loss scaling is not supported: write bf16"),
        ({"optimizer": {"type": "AdamW"}}, r"says optimizer: .*: leave it out; optim= decides"),
        ({"scheduler": {"type": "WarmupLR"}}, r"says scheduler: .*: leave it out; schedule= decides"),
        ({"train_batch_size": 8}, "says train_batch_size: 8: leave it out; train.batch_size decides"),
        ({"gradient_accumulation_steps": 4}, "says gradient_accumulation_steps: 4: leave it out"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}},
            "says offload_param to nvme: there are none and cpu",
        ),
    ],
)
def test_a_config_that_says_what_other_keys_decide_is_refused(
    parts: dict[str, object], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, tmp_path, **parts)
    with pytest.raises(UserError, match=told):
        zero.check()


@pytest.mark.parametrize("text", ["{", "[]", '{"zero": 3}'])
def test_a_file_that_is_no_deepspeed_config_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepspeed.json").write_text(text)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "deepspeed.json"))
    with pytest.raises(UserError, match="DeepSpeed part could not be read"):
        zero.check()


def test_a_package_that_is_not_there_is_named_with_what_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install deepspeed, or use launch/accelerate/fsdp2\.yaml"):
        zero.check()


def test_auto_and_what_agrees_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, tmp_path, train_batch_size="auto", gradient_clipping=1.0, bf16={"enabled": True},
          gradient_accumulation_steps=1, communication_data_type="fp32")  # fmt: skip
    zero.check()
    zero.refuse_other_clipping(1.0)
    assert zero.asked_to_cut()
    assert zero.asked_for_bfloat16()
    told = zero._config(1.0)
    assert told["gradient_clipping"] == 1.0
    assert told["communication_data_type"] == "fp32"
    assert "bf16" not in told, "autocast does it: weights stay float32"
    with pytest.raises(UserError, match=r"gradient_clipping: 1.0: leave it out; train.max_grad_norm decides"):
        zero.refuse_other_clipping(0.5)


def test_the_stage_comes_from_accelerates_own_keys_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    zero.check()
    assert not zero.asked_to_cut()
    assert zero._config(None)["gradient_clipping"] == 0.0


def test_nothing_is_asked_where_the_launcher_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    assert not zero.asked()
    assert not zero.asked_to_cut()
    assert not zero.asked_for_bfloat16()
    zero.refuse_other_clipping(1.0)
    assert "deepspeed" not in sys.modules
