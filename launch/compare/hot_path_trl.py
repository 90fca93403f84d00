#!/usr/bin/env python3
"""Train with TRL on the rows of hot_path.py, which runs this with TRL's interpreter: hot_path_trl.py JOB.json.

Stock settings that are fastest on a CPU: no activation checkpointing, batches of similar lengths, and for full fine-tuning with a
reference its log-probs computed beforehand. TRL scores only the completion's rows of the head where there is a Triton device,
and all rows elsewhere; with "fused" this choice is made for the CPU as well.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import trl
import trl.trainer.utils
from datasets import Dataset
from hot_path_meter import Meter
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

KINDS = {
    "sft": (trl.SFTConfig, trl.SFTTrainer), "dpo": (trl.DPOConfig, trl.DPOTrainer), "kto": (trl.KTOConfig, trl.KTOTrainer),
    "reward": (trl.RewardConfig, trl.RewardTrainer), "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
}  # fmt: skip


class Clock(TrainerCallback):
    """Passes TRL's events on to the meter."""

    def __init__(self, meter: Meter, output: Path) -> None:
        self.meter, self.output, self.tokens, self.prepared = meter, output, 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self.meter.begin(model, prepared=self.prepared)

    def on_step_begin(self, *args: Any, **others: Any) -> None:
        self.meter.step_begins()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.meter.step_ends(self.tokens)
        self.tokens = 0
        if state.global_step == state.max_steps:
            self.meter.write(self.output)
            os._exit(0)


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """Arguments of TRL's config that all trainers take, and those of the workload."""
    loss, half = job["loss"], job["dtype"] == "bfloat16"
    given = dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=job["batch_size"], num_train_epochs=1, bf16=half, use_cpu=True,
        gradient_checkpointing=False, report_to="none", save_strategy="no", learning_rate=1e-6, lr_scheduler_type="constant",
        warmup_steps=0, dataloader_pin_memory=False, disable_tqdm=True, seed=0,
    )  # fmt: skip
    if loss == "grpo":
        return given | dict(
            num_generations=job["batch_size"], steps_per_generation=1, max_completion_length=job["max_length"],
            loss_type="grpo", beta=0.0, shuffle_dataset=False,
        )  # fmt: skip
    given |= dict(max_length=job["max_length"])
    if loss in ("dpo", "kto"):
        given |= dict(beta=0.1, precompute_ref_log_probs=not job["lora"])
    if loss in ("dpo", "reward"):  # KTO's trainer keeps the order of the rows, which are sorted
        given |= dict(train_sampling_strategy="group_by_length", remove_unused_columns=False)
    if loss == "sft":
        given |= dict(packing=True, completion_only_loss=True)
    return given


def rows_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, each with its `length` for grouping; of rollouts the prompts alone, since what was sampled is given."""
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    if job["loss"] == "grpo":
        return [{"prompt": row["prompt"]} for row in rows[:: job["batch_size"]]]
    if job["loss"] == "kto":
        rows.sort(key=lambda row: -row["length"])
    return rows if job["loss"] in ("dpo", "reward") else [{k: row[k] for k in row if k != "length"} for row in rows]


def sampled(job: dict[str, Any], tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """The batches that GRPO's trainer would have sampled and scored."""
    rows, batches = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()], []
    for start in range(0, len(rows), job["batch_size"]):
        group = rows[start : start + job["batch_size"]]
        prompt = tokens(tokenizer, group[0]["prompt"], add_generation_prompt=True)
        answers = [tokens(tokenizer, row["prompt"] + row["completion"])[len(prompt) :] for row in group]
        width, rewards = max(map(len, answers)), torch.tensor([row["reward"] for row in group])
        padded = [answer + [tokenizer.pad_token_id] * (width - len(answer)) for answer in answers]
        mask = torch.tensor([[1] * len(answer) + [0] * (width - len(answer)) for answer in answers])
        prompts = torch.tensor([prompt] * len(group))
        batches.append({
            "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": torch.tensor(padded),
            "completion_mask": mask, "advantages": (rewards - rewards.mean()) / (rewards.std() + 1e-4),
            "num_items_in_batch": mask.sum(),
        })  # fmt: skip
    return batches


def tokens(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]


def useful(inputs: dict[str, torch.Tensor]) -> int:
    """Tokens of prompts and completions in a batch, without padding and without KTO's mismatched completions."""
    if "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    return inputs["input_ids"].numel()  # packed


def watch(trainer: Any, clock: Clock, batches: list[dict[str, torch.Tensor]] | None) -> None:
    """Count the tokens of each batch; with `batches`, train on them instead of sampling."""
    prepare = trainer._prepare_inputs
    given = iter(batches or [])

    def prepared(inputs: Any) -> Any:
        if batches is None:
            inputs = prepare(inputs)
            clock.tokens += useful(inputs)
            return inputs
        batch = next(given)
        clock.tokens += int(batch["prompt_mask"].sum() + batch["completion_mask"].sum())
        return batch

    trainer._prepare_inputs = prepared


def model_of(job: dict[str, Any], tokenizer: Any) -> Any:
    """Weights are bfloat16 only where they are frozen."""
    dtype = getattr(torch, job["dtype"]) if job["lora"] else torch.float32
    if job["loss"] != "reward":
        return AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], dtype=dtype, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def count_reference_time(clock: Clock, trainer: Any) -> None:
    """DPO's trainer computes the reference's log-probs when it is made."""
    compute = trainer._precompute_ref_logps

    def computed(*args: Any, **options: Any) -> Any:
        began = time.process_time()
        result = compute(*args, **options)
        clock.prepared += time.process_time() - began
        return result

    trainer._precompute_ref_logps = computed


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    if job["fused"]:
        trl.trainer.utils._use_triton = lambda device: True
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    config, kind = KINDS[job["loss"]]
    clock = Clock(Meter(tuple(job["gemm"]), getattr(torch, job["dtype"])), Path(job["output"]))
    if job["loss"] in ("dpo", "kto"):
        count_reference_time(clock, kind)
    task, lora = "SEQ_CLS" if job["loss"] == "reward" else "CAUSAL_LM", None
    if job["lora"]:
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type=task)
    more = {"reward_funcs": lambda completions, **others: [0.0] * len(completions)} if job["loss"] == "grpo" else {}
    trainer = kind(
        model=model_of(job, tokenizer), args=config(**settings(job)), train_dataset=Dataset.from_list(rows_of(job)),
        processing_class=tokenizer, peft_config=lora, callbacks=[clock], **more,
    )  # fmt: skip
    watch(trainer, clock, sampled(job, tokenizer) if job["loss"] == "grpo" else None)
    trainer.train()


if __name__ == "__main__":
    main()
