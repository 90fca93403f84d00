"""Strategies to test, as the environment variables that an accelerate config of each sets."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
NAMES = {"alone": "alone", "ddp": "DDP", "fsdp2": "FSDP2", "zero1": "DeepSpeed ZeRO-1", "zero2": "DeepSpeed ZeRO-2",
         "zero3": "DeepSpeed ZeRO-3"}  # fmt: skip


def settings(how: str, place: Path) -> dict[str, str]:
    if how == "fsdp2":
        return FSDP2
    if not how.startswith("zero"):
        return {}
    file = place / f"{how}.json"
    small = {  # beside a model for tests, as the defaults are beside a real one: it is cut, let go, and gathered ahead
        "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 200_000, "stage3_max_live_parameters": 300_000,
        "stage3_prefetch_bucket_size": 50_000,
    }  # fmt: skip
    file.write_text(json.dumps({"zero_optimization": {"stage": int(how[-1]), **small}}))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


def launcher(how: str, world: int) -> list[str]:
    alone = how == "alone" and world == 1
    return [] if alone else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]


def skip_unless_installed(how: str) -> None:
    if how.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
