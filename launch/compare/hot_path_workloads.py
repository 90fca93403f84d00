"""The workloads of hot_path.py: their files of rows, the FLOPs that these need at least, and the commands of both sides."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hot_path_data import GROUP, Pair, groups

ROOT, HERE = Path(__file__).resolve().parents[2], Path(__file__).resolve().parent
LORA_RANK = 16

Command = tuple[list[str], dict[str, str]]  # arguments, and what is added to the environment


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Of a dense language model."""

    linear: int  # weights of all linear layers but the head
    head: int  # weights of the head
    attention: int  # layers x heads x size of a head
    adapters: int  # weights of LoRA's on all these linear layers
    gemm: tuple[int, int]  # of the largest linear layer

    @classmethod
    def of(cls, directory: str) -> "Dimensions":
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        layers = [one.weight for one in model.modules() if isinstance(one, torch.nn.Linear) and one is not head]
        largest = max(layers, key=lambda weight: weight.numel())
        heads = config.num_attention_heads
        attention = config.num_hidden_layers * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        adapters = LORA_RANK * sum(sum(weight.shape) for weight in layers)
        linear = sum(weight.numel() for weight in layers)
        return cls(linear, head.weight.numel(), attention, adapters, (largest.shape[1], largest.shape[0]))

    def flops(self, workload: "Workload", prompt: int, branches: Sequence[int], mismatched: int = 0) -> float:
        """FLOPs that a prompt with its completions needs, the prompt once: matrix products and causal attention.

        Forward and backward, and a forward of the reference. The head over the vocabulary is applied to completions alone.
        `mismatched` tokens of a further completion need a forward of both models (KTO).
        """
        lora, scores = workload.lora, workload.loss == "reward"

        def forward(tokens: int, scored: int, visible: float) -> float:
            head = 0 if scores else 2 * self.head * scored
            return 2 * self.linear * tokens + head + 4 * self.attention * visible

        def visible(length: int) -> float:
            return length * prompt + length * (length + 1) / 2

        scored = sum(branches)
        seen = prompt * (prompt + 1) / 2 + sum(map(visible, branches))
        once = forward(prompt + scored, scored, seen)
        trained = 6 * self.adapters * (prompt + scored) if lora else 2 * self.linear * (prompt + scored)
        if not lora and not scores:
            trained += 2 * self.head * scored
        trained += 4 * self.attention * seen  # the backward of attention has four products for the two of its forward
        extra = 2 * forward(mismatched, mismatched, visible(mismatched))
        return once * (3 if workload.refers else 2) + trained + extra


@dataclass(frozen=True, slots=True)
class Workload:
    loss: str
    lora: bool
    peers: tuple[str, ...] = ("stock", "fused")  # TRL's heads
    refers: bool = False

    @property
    def rows(self) -> str:
        return {"kto": "halves", "sft": "halves", "grpo": "groups"}.get(self.loss, "pairs")


WORKLOADS = {
    "dpo-lora": Workload("dpo", lora=True, refers=True),
    "dpo-full": Workload("dpo", lora=False, refers=True),
    "kto-lora": Workload("kto", lora=True, refers=True),
    "sft-full": Workload("sft", lora=False, peers=("fused",)),  # packed
    "reward-lora": Workload("reward", lora=True, peers=("stock",)),  # it has no head over the vocabulary
    "grpo-lora": Workload("grpo", lora=True),
}


@dataclass(frozen=True, slots=True)
class Rows:
    """A workload's file, and what is known about it."""

    path: Path
    batch_size: int
    tokens: int  # useful ones
    flops: float  # needed


def written(name: str, pairs: Sequence[Pair], tokenizer: Any, size: Dimensions, given: argparse.Namespace, work: Path) -> Rows:
    """Write a workload's rows. Of the halves of pairs a batch holds as many as of pairs."""
    workload, records, tokens, flops = WORKLOADS[name], list[dict[str, Any]](), 0, 0.0
    if workload.rows == "groups":
        for prompt, completions, lengths in groups(pairs, tokenizer, count=given.steps, limit=given.max_length):
            records += [{"prompt": prompt, "completion": one, "reward": float(n % 2)} for n, one in enumerate(completions)]
            tokens += GROUP * lengths[0] + sum(lengths[1:])
            flops += size.flops(workload, lengths[0], lengths[1:])
    for pair in pairs if workload.rows != "groups" else ():
        start, *ends = pair.lengths
        tokens += 2 * start + sum(ends)
        if workload.rows == "pairs":
            records.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "length": start + max(ends)})
            flops += size.flops(workload, start, ends)
            continue
        for completion, end, label in zip((pair.chosen, pair.rejected), ends, (True, False), strict=True):
            more = {"label": label} if workload.loss == "kto" else {}
            records.append({"prompt": pair.prompt, "completion": completion, **more, "length": start + end})
            flops += size.flops(workload, start, [end], mismatched=end if more else 0)
    path = work / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Rows(path, GROUP if workload.rows == "groups" else len(records) // given.steps, tokens, flops)


def ours(name: str, rows: Rows, size: Dimensions, given: argparse.Namespace, output: Path) -> Command:
    """The command of halos' run, and its environment."""
    workload, half = WORKLOADS[name], given.dtype == "bfloat16"
    weights = [f"model.dtype={given.dtype}", "peft=lora", f"peft.r={LORA_RANK}", f"peft.lora_alpha={2 * LORA_RANK}"]
    hook = f"_target_: hot_path_hook.MeterHook, output: '{output}', inner: {size.gemm[0]}, outer: {size.gemm[1]}"
    command = [
        sys.executable, str(ROOT / "train.py"), f"loss={workload.loss}", f"model.name_or_path={given.model}",
        *(weights if workload.lora else []), f"train.precision={'bfloat16' if half else 'float32'}",
        f"data.train=['{rows.path}']", "data.eval=[]", f"train.batch_size={rows.batch_size}",
        f"train.max_length={given.max_length}", "optim.lr=1e-6", "schedule=constant", "checkpoint.every=null",
        "checkpoint.merge_lora=false", "plugins=[hot_path_hook]",
        f"+hooks.meter={{{hook}, dtype: {given.dtype}}}", f"output_root={output.parent}/runs", f"exp_name={output.stem}",
        *given.set,
    ]  # fmt: skip
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return command, {"PYTHONPATH": paths, "HALOS_CACHE": f"{output.parent}/cache-{output.stem}"}


def trl(name: str, head: str, rows: Rows, size: Dimensions, given: argparse.Namespace, output: Path) -> Command:
    """The command of TRL's run, which reads its job from a file, and its environment."""
    workload = WORKLOADS[name]
    batch = rows.batch_size
    if workload.loss == "sft":  # packed rows with about the tokens of the batch
        batch = max(1, round(rows.tokens / given.steps / given.max_length))
    job = {
        "loss": workload.loss, "lora": workload.lora, "fused": head == "fused", "model": str(given.model), "rows": str(rows.path),
        "batch_size": batch, "max_length": given.max_length, "dtype": given.dtype, "gemm": size.gemm, "output": str(output),
    }  # fmt: skip
    path = output.with_suffix(".job")
    path.write_text(json.dumps(job))
    return [given.trl_python, str(HERE / "hot_path_trl.py"), str(path)], {"HF_HOME": f"{output.parent}/hf"}


def commands(name: str, rows: Rows, size: Dimensions, given: argparse.Namespace) -> dict[str, Callable[[Path], Command]]:
    """By implementation, its command for an output file."""
    made: dict[str, Callable[[Path], Command]] = {"halos": partial(ours, name, rows, size, given)}
    for head in () if given.no_trl else WORKLOADS[name].peers:
        made[head] = partial(trl, name, head, rows, size, given)
    return made
