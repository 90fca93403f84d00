"""The DeepSpeed part of an accelerate config is read, and refused before anything loads. Training and resuming under DeepSpeed
are tested in tests/launch."""

import json
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from halos.distributed import deepspeed_config as config
from halos.distributed.deepspeed import DeepSpeed, DeepSpeed3
from halos.distributed.replicated import Replicated
from halos.distributed.strategies import requested_strategy
from halos.errors import UserError


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(config, "find_spec", lambda name: ModuleSpec(name, None))
    if find_spec("deepspeed") is None:
        monkeypatch.setattr(config, "package", MagicMock)


def write_config(monkeypatch: pytest.MonkeyPatch, place: Path, **parts: object) -> None:
    file = place / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, **parts}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "ZeRO stage 0: there are the numbers 1, 2 and 3, or use launch/accelerate/fsdp2"),
        ({"zero_optimization": {"stage": "3"}}, "ZeRO stage '3': there are the numbers 1, 2 and 3"),
        ({"zero_optimization": None}, "ZeRO stage None"),
        ({"fp16": True}, "says fp16: True: it must be an object"),
        ({"bf16": "auto"}, "says bf16: 'auto': it must be an object"),
        ({"torch_autocast": {"enabled": True}}, "leave it out; train.precision decides"),
        ({"sequence_parallel_size": 2}, "says sequence_parallel_size, which is not passed on"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size: 2, which is not supported"),
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
def test_settings_that_other_keys_decide_or_that_are_not_supported_are_refused(
    parts: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(monkeypatch, tmp_path, **parts)
    with pytest.raises(UserError, match=message):
        config.check_config()


@pytest.mark.parametrize("text", ["{", "[]", '{"zero": 3}'])
def test_a_file_that_is_no_deepspeed_config_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepspeed.json").write_text(text)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "deepspeed.json"))
    with pytest.raises(UserError, match="DeepSpeed part could not be read"):
        config.check_config()


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, "overlap_com"),
        ({"communication_data_type": "bfloat"}, "communication_data_type"),
    ],
)
def test_what_deepspeed_itself_refuses_becomes_one_message(
    parts: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(monkeypatch, tmp_path, **parts)
    with pytest.raises(UserError, match=f"DeepSpeed does not take its config: .*{message}"):
        config.check_config()


def test_a_missing_package_is_named_with_an_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install deepspeed, or use launch/accelerate/fsdp2\.yaml"):
        config.check_config()


def test_auto_and_equal_values_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(monkeypatch, tmp_path, train_batch_size="auto", gradient_clipping=1.0, bf16={"enabled": True},
          gradient_accumulation_steps=1, communication_data_type="fp32")  # fmt: skip
    config.check_config()
    config.refuse_settings(max_grad_norm=1.0, trained="auto")
    assert requested_strategy() is DeepSpeed3
    assert config.bfloat16_requested()
    engine = config.engine_config(1.0)
    assert engine["gradient_clipping"] == 1.0
    assert engine["communication_data_type"] == "fp32"
    assert "bf16" not in engine, "autocast does it: weights stay float32"
    with pytest.raises(UserError, match=r"gradient_clipping: 1.0: leave it out; train.max_grad_norm decides"):
        config.refuse_settings(max_grad_norm=0.5, trained="auto")
    with pytest.raises(UserError, match=r"model\.dtype=bfloat16 with peft=none: under DeepSpeed trained parameters are float32"):
        config.refuse_settings(max_grad_norm=1.0, trained="bfloat16")


def test_the_stage_comes_from_accelerates_own_keys_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    config.check_config()
    assert requested_strategy() is DeepSpeed
    assert config.engine_config(None)["gradient_clipping"] == 0.0


def test_a_launcher_without_deepspeed_requests_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    assert not config.deepspeed_requested()
    assert requested_strategy() is Replicated
    assert not config.bfloat16_requested()
    config.refuse_settings(max_grad_norm=1.0, trained="bfloat16")
