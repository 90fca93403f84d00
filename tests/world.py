"""A small base model, preference pairs and a chat template in a directory, and runs on them: for tests of resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import compose
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import train
from halos.errors import UserError
from halos.models import tiny
from halos.run.lifecycle import run

SETTINGS = ["loss=dpo", "train.steps=4", "train.batch_size=8", "checkpoint.every=2", "checkpoint.keep_last=9", "optim.lr=1e-3",
         "train.eval_every=null", "train.eval_at_start=false", "train.max_length=128"]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ('<|end|>' if m['role'] == 'assistant' else '\n') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def pairs(count: int, word: str = "no") -> list[str]:
    return [json.dumps({"prompt": f"Count {n}", "chosen": f"one {n % 7}", "rejected": f"{word} {n}"}) for n in range(count)]


class World:
    """A base model, data and a template in `place`, and its runs in runs/."""

    def __init__(self, place: Path, cache: Path) -> None:
        self.place, self.cache = place, cache
        self.base, self.data, self.eval_data, self.template = (place / name for name in ("base", "s.jsonl", "e.jsonl", "t.jinja"))
        place.mkdir(exist_ok=True)
        tiny.build(self.base)
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
        LlamaForCausalLM(LlamaConfig.from_pretrained(self.base, num_key_value_heads=2, **sizes)).save_pretrained(self.base)
        self.data.write_text("\n".join(pairs(24)))
        self.eval_data.write_text("\n".join(pairs(8)))
        self.template.write_text(TEMPLATE)

    def words(self, name: str, *more: str) -> list[str]:
        return [*SETTINGS, f"model.name_or_path={self.base}", f"model.chat_template={self.template}", f"data.train=[{self.data}]",
                f"data.eval=[{self.eval_data}]", f"exp_name={name}", *more]  # fmt: skip

    def train(self, name: str, *more: str) -> Path:
        """Run to the end, and return the directory."""
        config = compose(self.cache, self.place / "runs", *self.words(name, *more))
        assert run(config, []) == 0
        return Path(config.run_dir)

    def begin(self, name: str, *more: str) -> Path:
        """Return the directory of a run that was stopped at step 2."""
        return stopped(self.train(name, *more))

    def refusal(self, name: str, *more: str) -> str:
        """Return the message with which a new run is refused."""
        with pytest.raises(UserError) as caught:
            run(compose(self.cache, self.place / "runs", *self.words(name, *more)), [])
        return str(caught.value)


def stopped(directory: Path) -> Path:
    shutil.rmtree(directory / "FINAL")
    shutil.rmtree(directory / "checkpoints" / "step-00000004")
    (directory / "result.json").write_text('{"status": "stopped", "step": 2, "metrics": {}}')
    return directory


def resume(directory: Path, *words: str) -> int:
    return train.start([f"resume={directory}", *words])


def refusal(directory: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        resume(directory, *words)
    return str(caught.value)


def attempts(directory: Path) -> list[dict[str, Any]]:
    return [yaml.safe_load(path.read_text()) for path in sorted((directory / "attempts").glob("*.yaml"))]


def copied(directory: Path, place: Path) -> Path:
    return Path(shutil.copytree(directory, place / directory.name))


def final(directory: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(directory / "FINAL" / "model.safetensors").items()}


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def log_of(directory: Path) -> str:
    return (directory / "train.log").read_text()
