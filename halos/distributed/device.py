"""The device and precision of this process: what the launcher requests, what the GPU supports, how torch is set up."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch
import yaml

from halos.distributed.environment import DETERMINISTIC


@dataclass(frozen=True, slots=True)
class LauncherSettings:
    """Settings from accelerate's command line and config file. Its environment variables mix them with its own defaults."""

    num_processes: int | None = None
    mixed_precision: str | None = None
    use_cpu: bool = False


@cache
def launcher_settings() -> LauncherSettings:
    """Return the settings of the `accelerate launch` that started this process; empty if there was none."""
    arguments = parent_command()
    if not is_accelerate_launch(arguments):
        return LauncherSettings()
    config = _read_config(_option(arguments, "config_file"))
    number, precision = _option(arguments, "num_processes"), _option(arguments, "mixed_precision")
    return LauncherSettings(
        num_processes=int(number) if number and number.isdigit() else _int_or_none(config.get("num_processes")),
        mixed_precision=precision or _precision_or_none(config.get("mixed_precision")),
        use_cpu="--cpu" in arguments or config.get("use_cpu") is True,
    )


def cpu_requested() -> bool:
    """Return whether the launcher requests the CPU, even on a machine with a GPU."""
    return launcher_settings().use_cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")


def uses_gpu() -> bool:
    return not cpu_requested() and torch.cuda.is_available()


def has_bfloat16() -> bool:
    """Return whether the GPU supports bfloat16 in hardware: torch also counts GPUs that only emulate it."""
    return uses_gpu() and torch.cuda.is_bf16_supported(including_emulation=False)


def requested_precision() -> str | None:
    """Return the launcher's mixed_precision if the user set it: accelerate sets its variable to `no` by default."""
    if is_accelerate_launch(parent_command()):
        return launcher_settings().mixed_precision
    return os.environ.get("ACCELERATE_MIXED_PRECISION")


def prepare_torch(*, deterministic: bool = False) -> None:
    """Configure torch in this process, before its first call to a GPU.

    cuDNN's attention builds a plan for each new shape and stride, and packed rows have new ones in nearly every call: a plan
    costs a hundred times the attention itself. Flash attention takes over.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not uses_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # libraries import DeepSpeed where it is installed, and it logs a warning
    if deterministic:
        os.environ.update(DETERMINISTIC)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed torch's generators of the CPU and of a device as `torch.manual_seed` does, which also queues the seed for each kind
    of device that is not in use, with a formatted call stack: milliseconds a call."""
    if device.type in ("cpu", "cuda"):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def seed_all(seed: int) -> None:
    """Seed torch's generators of the CPU and of every device there is, as `torch.manual_seed` does, without its queues."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def is_accelerate_launch(arguments: list[str]) -> bool:
    """Return whether a command line is `accelerate launch`, or its module by -m or by path."""
    if any("accelerate/commands/launch" in each or "accelerate.commands.launch" in each for each in arguments):
        return True
    return "launch" in arguments and any("accelerate" in each for each in arguments[: arguments.index("launch")])


def parent_command() -> list[str]:
    """Return the command line of this process's parent; empty if it cannot be read."""
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def _read_config(name: str | None) -> dict[str, object]:
    """Read accelerate's config from the named file, else from the one that `accelerate config` wrote; empty if there is none."""
    if name is None:
        from accelerate.commands.config.config_args import default_config_file  # here: most runs do not need it

        name = str(default_config_file)
    path = Path(name)
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return settings if isinstance(settings, dict) else {}


def _option(arguments: list[str], name: str) -> str | None:
    """Return the value of `--name VALUE` or `--name=VALUE`, spelled with _ or -."""
    spellings = (f"--{name}", f"--{name.replace('_', '-')}")
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument in spellings:
            return following
        if argument.partition("=")[0] in spellings:
            return argument.partition("=")[2]
    return None


def _int_or_none(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _precision_or_none(value: object) -> str | None:
    """Return a mixed_precision setting as text; YAML reads an unquoted `no` as False."""
    return "no" if value is False else value if isinstance(value, str) else None
