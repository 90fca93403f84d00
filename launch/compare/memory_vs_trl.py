#!/usr/bin/env python3
"""Compare peak memory and CPU time of DPO with LoRA with TRL's, on the same model, data, batch size and length.

    python launch/compare/memory_vs_trl.py MODEL_DIR PAIRS.jsonl --trl-python .venv-trl/bin/python

TRL needs an environment of its own (pip install trl==1.16.0 peft). PAIRS.jsonl has prompt, chosen and rejected as
message lists; without it, the bundled arithmetic is used. Both run in float32 for the same number of steps; the peak is
that of the whole process, as the operating system reports it; quote the ratio.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def ours(python: str, model: str, pairs: Path, settings: argparse.Namespace, work: Path) -> list[str]:
    return [
        python, str(ROOT / "train.py"), "loss=dpo", "peft=lora", f"model.name_or_path={model}", "model.dtype=float32",
        f"data.train=[{pairs}]", "data.eval=[]", f"train.steps={settings.steps}", f"train.batch_size={settings.pairs}",
        f"train.microbatch_size={settings.pairs}", f"train.max_length={settings.length}", "train.precision=float32",
        f"train.activation_checkpointing={str(settings.checkpointing).lower()}", "checkpoint.every=null",
        "checkpoint.merge_lora=false", f"output_root={work}", "exp_name=ours", "overwrite=true",
    ]  # fmt: skip


def trl(model: str, pairs: str, settings: argparse.Namespace) -> None:
    """Run TRL's DPOTrainer with the same adapter, in its own interpreter."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=settings.pairs, max_steps=settings.steps,
        max_length=settings.length, gradient_checkpointing=settings.checkpointing, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", logging_steps=1, learning_rate=1e-5, dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=config,
        train_dataset=load_dataset("json", data_files=pairs, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=lora,
    )
    trainer.train()


def measure(command: list[str]) -> tuple[float, float]:
    """Return peak resident MiB and CPU seconds of a command and the children that it waits for."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            sys.exit(f"{' '.join(command[:2])} failed:\n{log.read().decode()[-3000:]}")
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return usage.ru_maxrss / scale, usage.ru_utime + usage.ru_stime


def bundled(path: Path) -> Path:
    sys.path.insert(0, str(ROOT))
    from halos.data import arithmetic

    path.write_text("".join(json.dumps(row) + "\n" for row in arithmetic.rows("train")))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--trl-python", help="an interpreter that has trl and peft")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=4, help="in a batch, which is one micro-batch")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing on both sides")
    parser.add_argument("--role", choices=["driver", "trl"], default="driver", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.role == "trl":
        trl(settings.model, str(settings.data), settings)
        return
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        pairs = settings.data.resolve() if settings.data else bundled(work / "pairs.jsonl")
        began = time.time()
        mine = measure(ours(sys.executable, settings.model, pairs, settings, work))
        same = ["--steps", settings.steps, "--pairs", settings.pairs, "--length", settings.length]
        same += ["--checkpointing"] if settings.checkpointing else []
        theirs = measure(
            [settings.trl_python or sys.executable, __file__, settings.model, str(pairs), "--role", "trl", *map(str, same)]
        )
    print("| | peak MiB | CPU s, start-up included |\n| --- | --- | --- |")
    print(f"| halos | {mine[0]:.0f} | {mine[1]:.0f} |\n| TRL | {theirs[0]:.0f} | {theirs[1]:.0f} |")
    print(f"| ratio | {mine[0] / theirs[0]:.2f} | {mine[1] / theirs[1]:.2f} |")
    print(f"\n{settings.steps} steps of {settings.pairs} pairs up to {settings.length} tokens, float32, one thread, activation "
          f"checkpointing {'on' if settings.checkpointing else 'off'}, {time.time() - began:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
