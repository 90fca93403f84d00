"""Requests for a device and a precision are distinguished from accelerate's defaults, and followed; torch is set up for them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from halos.distributed import device, launch
from halos.logps.model import scores_of
from halos.models.load import weights_dtype
from halos.trainers.base import Trainer

CONFIGS = Path(__file__).resolve().parents[2] / "launch" / "accelerate"
GPUS = ["gpu1", "ddp", "ddp_multinode", "fsdp2", "fsdp2_multinode", "deepspeed_zero2", "deepspeed_zero3"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`launched("--config_file", ...)`: this process was started by such an accelerate launch, on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # accelerate sets it by default
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)

    def command(*options: str) -> None:
        monkeypatch.setattr(device, "parent_command", lambda: ["python", "/bin/accelerate", "launch", *options, "train.py"])
        device.launcher_settings.cache_clear()

    yield command
    device.launcher_settings.cache_clear()


@pytest.mark.parametrize("name", ["cpu1", "cpu2", "cpu2_fsdp2", "cpu2_zero3"])
def test_a_config_for_the_cpu_uses_no_gpu(name: str, launched: Callable[..., None]) -> None:
    launched("--config_file", str(CONFIGS / f"{name}.yaml"))
    assert not device.uses_gpu()


@pytest.mark.parametrize("name", GPUS)
def test_a_config_for_gpus_uses_them_and_requests_bfloat16(name: str, launched: Callable[..., None]) -> None:
    launched(f"--config-file={CONFIGS / f'{name}.yaml'}")
    assert device.uses_gpu()
    assert device.requested_precision() == "bf16"


@pytest.mark.parametrize(
    ("line", "options", "requested"),
    [("mixed_precision: no", [], "no"), ("mixed_precision: 'no'", [], "no"), ("mixed_precision: bf16", [], "bf16"),
     ("", [], None), ("", ["--mixed_precision", "no"], "no"), ("mixed_precision: no", ["--mixed_precision=bf16"], "bf16")],
)  # fmt: skip
def test_a_precision_that_the_user_set_is_distinguished_from_the_launchers_default(
    line: str, options: list[str], requested: str | None, launched: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(f"distributed_type: MULTI_GPU\nnum_processes: 8\n{line}\n")
    launched("--config_file", str(tmp_path / "mine.yaml"), *options)
    assert device.requested_precision() == requested
    assert device.launcher_settings().num_processes == 8


def test_without_accelerate_launch_its_variable_is_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "parent_command", lambda: ["srun", "python", "rank.py"])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert device.requested_precision() == "no"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert device.requested_precision() is None


@pytest.mark.parametrize(
    ("precision", "dtype", "requested", "gpu", "mixed"),
    [("auto", "auto", None, True, "bf16"), ("auto", "auto", None, False, "no"), ("auto", "auto", "no", True, "no"),
     ("auto", "auto", "bf16", False, "bf16"), ("auto", "bfloat16", "no", False, "bf16"),
     ("float32", "bfloat16", "bf16", True, "no"), ("bfloat16", "auto", "no", False, "bf16")],
)  # fmt: skip
def test_an_override_takes_precedence_over_the_launcher_and_that_over_the_hardware(
    precision: str, dtype: str, requested: str | None, gpu: bool, mixed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accelerator(**settings: Any) -> Any:
        return SimpleNamespace(num_processes=1, gradient_accumulation_steps=1, **settings)

    for name, value in {"requested_precision": requested, "has_bfloat16": gpu, "uses_gpu": gpu}.items():
        monkeypatch.setattr(launch, name, lambda value=value: value)
    monkeypatch.setattr(launch, "Accelerator", accelerator)
    obtained: Any = launch.make_accelerator(precision, dtype)
    assert (obtained.mixed_precision, obtained.cpu) == (mixed, not gpu)


def test_a_gpu_that_only_emulates_bfloat16_has_none(launched: Callable[..., None]) -> None:
    launched("--num_processes", "1")
    assert not device.has_bfloat16()


def test_a_frozen_base_is_bfloat16_only_where_the_arithmetic_is() -> None:
    wanted = {(False, True): torch.bfloat16, (False, False): torch.float32, (True, True): torch.float32}
    assert {key: weights_dtype("auto", trained=key[0], half=key[1]) for key in wanted} == wanted
    assert weights_dtype("float32", trained=False, half=True) is torch.float32


def test_cudnn_attention_is_off_and_deterministic_kernels_train(
    monkeypatch: pytest.MonkeyPatch, trainer: Callable[..., Trainer]
) -> None:
    for name in device.DETERMINISTIC:
        monkeypatch.delenv(name, raising=False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        device.prepare_torch()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.are_deterministic_algorithms_enabled()
        device.prepare_torch(deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert all(os.environ[name] == value for name, value in device.DETERMINISTIC.items())
        training = trainer("loss=dpo", "peft=lora", "train.batch_size=4", "train.microbatch_size=2", "train.steps=1")
        totals = training.step(training.order.batch(0))  # an operation without such a kernel raises
        assert totals["grad_norm"][0] > 0
    finally:
        torch.use_deterministic_algorithms(False)
        for name in device.DETERMINISTIC:
            os.environ.pop(name, None)


class Scorer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
        self.score.weight.data = torch.tensor([[1.0, 0.0078125]], dtype=torch.bfloat16)


def test_scores_are_computed_in_float32_whatever_the_weights_are_in() -> None:
    hidden = torch.tensor([[256.0, 1.0], [256.0, 2.0]], dtype=torch.bfloat16)  # as bfloat16 all scores would be 256
    assert scores_of(Scorer(), hidden)[:, 0].tolist() == [256.0078125, 256.015625]


def test_generators_are_seeded_as_torch_does_and_no_call_stack_is_formatted(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2**62 + 5)
    expected = torch.rand(3)
    formatted: list[int] = []
    monkeypatch.setattr("traceback.format_stack", lambda *_: formatted.append(1) or [])
    device.seed_generators(torch.device("cpu"), 2**62 + 5)
    assert torch.equal(torch.rand(3), expected)
    assert not formatted
