"""Whether this process uses a GPU, what that GPU can do, and how torch computes on it."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch
import yaml

DETERMINISTIC = {  # read by cuBLAS and by flash-attn, before their first call
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
}


@dataclass(frozen=True, slots=True)
class LauncherSettings:
    """What accelerate's command line and config file say. Its environment does not tell that from its own defaults."""

    num_processes: int | None = None
    mixed_precision: str | None = None
    use_cpu: bool = False


@cache
def launcher_settings() -> LauncherSettings:
    """Of the `accelerate launch` that started this process; empty where another launcher did, or none."""
    words = parent_command()
    if not is_accelerate(words):
        return LauncherSettings()
    config = _read(_option(words, "config_file"))
    number, precision = _option(words, "num_processes"), _option(words, "mixed_precision")
    return LauncherSettings(
        num_processes=int(number) if number and number.isdigit() else _whole(config.get("num_processes")),
        mixed_precision=precision or _word(config.get("mixed_precision")),
        use_cpu="--cpu" in words or config.get("use_cpu") is True,
    )


def cpu_asked() -> bool:
    """Whether the launcher was told to stay on the CPU, whatever else this machine has."""
    return launcher_settings().use_cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")


def uses_gpu() -> bool:
    return not cpu_asked() and torch.cuda.is_available()


def has_bfloat16() -> bool:
    """Whether the GPU of this process computes in bfloat16 itself: torch also counts GPUs that only emulate it."""
    return uses_gpu() and torch.cuda.is_bf16_supported(including_emulation=False)


def precision_asked() -> str | None:
    """The launcher's mixed_precision where somebody wrote it down: accelerate sets its variable to `no` also where nobody did."""
    if is_accelerate(parent_command()):
        return launcher_settings().mixed_precision
    return os.environ.get("ACCELERATE_MIXED_PRECISION")


def prepare_torch(*, deterministic: bool = False) -> None:
    """How torch is to compute in this process; before its first call to a GPU.

    cuDNN's attention builds a plan for each new shape and stride, and packed rows have new ones in nearly every call: a plan
    costs a hundred times the attention itself. Flash attention takes over.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not uses_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # libraries import DeepSpeed where it is installed, and it wonders aloud
    if deterministic:
        os.environ.update(DETERMINISTIC)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore


def is_accelerate(words: list[str]) -> bool:
    """Whether a command is `accelerate launch`, or its module by -m or by path."""
    if any("accelerate/commands/launch" in word or "accelerate.commands.launch" in word for word in words):
        return True
    return "launch" in words and any("accelerate" in word for word in words[: words.index("launch")])


def parent_command() -> list[str]:
    """The command line of this process's parent; empty where it cannot be read."""
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def _read(name: str | None) -> dict[str, object]:
    """accelerate's config: the file that was named, else the one that `accelerate config` wrote; empty where there is none."""
    if name is None:
        from accelerate.commands.config.config_args import default_config_file  # here: most starts do without

        name = str(default_config_file)
    path = Path(name)
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return settings if isinstance(settings, dict) else {}


def _option(words: list[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`, spelled with _ or -."""
    spellings = (f"--{name}", f"--{name.replace('_', '-')}")
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in spellings:
            return following
        if word.partition("=")[0] in spellings:
            return word.partition("=")[2]
    return None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _word(value: object) -> str | None:
    """YAML reads an unquoted `no` as False."""
    return "no" if value is False else value if isinstance(value, str) else None
