"""Every loss of config/loss trains five steps, whole and with LoRA; resumed amid them it ends with the same bits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from halos.config.schema import Config
from halos.run.lifecycle import run
from tests.losses import cases

SETTINGS = ["train.steps=5", "train.epochs=null", "train.batch_size=8", "train.microbatch_size=5", "train.eval_every=null",
            "train.eval_at_start=false", "checkpoint.every=2", "checkpoint.keep_last=2", "optim.lr=1e-3"]  # fmt: skip
TIMED = {"seconds", "tokens_per_second", "peak_memory_mb"}
FAST = {("bco", "none")}  # the rest differs by what other tests hold
CELLS = [(case.name, peft) for case in cases.of_this_package() for peft in ("none", "lora")]


def rows(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMED} for line in lines]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {f"{path.relative_to(directory)}/{name}": tensor for path in sorted((directory / "FINAL").rglob("*.safetensors"))
            for name, tensor in load_file(path).items()}  # fmt: skip


def rewarded(place: Path) -> list[str]:
    """Four completions of each of eight prompts, with rewards of 0 and 1."""
    samples = [{"prompt": f"Count to {n}", "completion": " ".join(map(str, range(k + 1))), "reward": int(k == n % 4)}
               for n in range(8) for k in range(4)]  # fmt: skip
    (place / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return [f"data.train=['{place / 'samples.jsonl'}']", "data.eval=[]"]


@pytest.mark.parametrize(
    ("loss", "peft"), [pytest.param(*cell, marks=[] if cell in FAST else [pytest.mark.slow]) for cell in CELLS]
)
def test_five_steps_resumed_amid_them_end_like_five_in_one_go(
    loss: str, peft: str, configure: Callable[..., Config], tmp_path: Path
) -> None:
    data = rewarded(tmp_path) if loss == "max_rl" else []  # whose rewards are from 0 up, and labels are -1 and 1
    new_tokens = ["peft.modules_to_save=[embed_tokens]"] if (loss, peft) == ("csft", "lora") else []
    teacher = ["reference.name_or_path=tiny"] if loss in cases.TAUGHT else []
    config = configure(f"loss={loss}", f"peft={peft}", *SETTINGS, *data, *new_tokens, *teacher, "exp_name=whole")
    assert run(config, []) == 0
    resumed = Path(shutil.copytree(tmp_path / "whole", tmp_path / "resumed"))
    for gone in ("FINAL", "checkpoints/step-00000005"):
        shutil.rmtree(resumed / gone, ignore_errors=True)
    (resumed / "result.json").unlink()
    assert train.start([f"resume={resumed}"]) == 0
    assert "step-00000004" in (resumed / "attempts" / "001.yaml").read_text()
    mine, theirs = weights(resumed), weights(tmp_path / "whole")
    assert mine.keys() == theirs.keys()
    assert mine
    assert all(tensor.equal(theirs[name]) for name, tensor in mine.items())
    assert rows(resumed) == rows(tmp_path / "whole")
