"""Short runs of every kind: each must finish with finite numbers."""

import json
import math
from typing import Any

from gpu.place import ROOT, Place, Result, Run

MODEL = ["model=tiny", "data=arithmetic", "train.batch_size=16"]
TINY = [*MODEL, "data.eval=[{path: arithmetic, split: 'eval[:12]'}]", "train.steps=4", "train.eval_every=null",
        "train.eval_at_start=false"]  # fmt: skip
ONLINE = ["loss=online", *MODEL, "data.eval=[]", "online.samples_per_prompt=4", "online.sampler.max_new_tokens=24",
          "online.scorer.functions=[{function: length, target: 4}]"]  # fmt: skip
LIVE = [*ONLINE, "online.loss=grpo", "online.steps=2", "online.eval_prompts=0"]
ROUNDS = [*ONLINE, "online.loss=dpo", "online.rounds=1", "online.steps_per_round=2", "online.eval_prompts=4", "peft=lora"]
FLOAT32, BFLOAT16, LORA = "train.precision=float32", "train.precision=bfloat16", "peft=lora"
RUNS: dict[str, list[str]] = {
    "sft-full": ["loss=sft", *TINY],
    "dpo-lora": ["loss=dpo", LORA, *TINY],
    "live-full": LIVE,
    "reward-lora": ["loss=reward", LORA, *TINY],
    "deterministic-mode": ["loss=kto", LORA, *TINY, "train.deterministic=true"],
    "sft-lora-float32": ["loss=sft", LORA, *TINY, FLOAT32],
    "dpo-full-float32": ["loss=dpo", *TINY, FLOAT32],
    "dpo-full-bfloat16": ["loss=dpo", *TINY, BFLOAT16],
    "dpo-unshared-prompts": ["loss=dpo", LORA, *TINY, "train.share_prompts=false", "train.microbatch_size=5"],
    "kto-lora-dropout-checkpointing": ["loss=kto", LORA, *TINY, "peft.lora_dropout=0.1", "train.activation_checkpointing=true"],
    "kto-full": ["loss=kto", *TINY],
    "reward-full": ["loss=reward", *TINY],
    "grpo-offline": ["loss=grpo", LORA, *TINY],
    "ppo-offline": ["loss=ppo", *TINY],
    "live-lora": [*LIVE, LORA],
    "rounds": ROUNDS,
    "compiled": ["loss=dpo", LORA, *TINY, "train.compile=true"],
    "async-save": ["loss=dpo", *TINY, "checkpoint.every=2", "checkpoint.async_save=true"],
    "muon": ["loss=sft", *TINY, "optim=muon"],
    "flash-attention-2": ["loss=dpo", LORA, *TINY, "model.attention=flash_attention_2", BFLOAT16],
    "ddp": ["loss=dpo", LORA, *TINY, "checkpoint.every=2"],
    "fsdp2": ["loss=dpo", LORA, *TINY, "checkpoint.every=2"],
}
WIDE = {"wide-sft-full": ("sft-full", ["loss=sft"]), "wide-dpo-lora": ("dpo-lora", ["loss=dpo", LORA])}
LAUNCHED = {"ddp": ("ddp", "cpu1"), "fsdp2": ("fsdp2", "cpu2_fsdp2")}  # accelerate configs on a card, on a CPU
PORTS = {"ddp": "29611", "fsdp2": "29612"}  # they may run side by side


def check(name: str, place: Place) -> Result:
    """The run `crash-NAME`."""
    kind = name.removeprefix("crash-")
    if kind == "flash-attention-2" and not place.card.get("flash_attn"):
        return Result("skipped", "flash-attn is not installed")
    start: list[str] = []
    if kind in LAUNCHED:
        config = ROOT / "launch" / "accelerate" / f"{LAUNCHED[kind][0 if place.cuda else 1]}.yaml"
        processes = [*(["--num_processes", "1"] if place.cuda else []), "--main_process_port", PORTS[kind]]
        start = ["-m", "accelerate.commands.launch", "--config_file", str(config), *processes]
    done = place.train(name, *words_of(kind, place), start=start)
    return judge(name, place, done)


def words_of(kind: str, place: Place) -> list[str]:
    if kind not in WIDE:
        return RUNS[kind]
    from gpu import rows  # here, since its imports take longer than other runs' checks

    workload, words = WIDE[kind]
    made = rows.make(workload, "wide", place, steps=3, batch_size=8, answers=True)
    return [*words, f"model.name_or_path={place.model('wide')}", f"data.train=['{made.path}']", "data.eval=[]", "train.steps=3",
            f"train.batch_size={made.batch_size}", f"train.max_length={rows.LONGEST}", "checkpoint.every=null"]  # fmt: skip


def judge(name: str, place: Place, done: Run) -> Result:
    """Whether a run finished, with finite losses and a merge that holds."""
    if done.returncode != 0:
        return Result.crash(done)
    result = json.loads((place.run(name) / "result.json").read_text())
    losses = [row["loss"] for row in place.metrics(name)]
    data: dict[str, Any] = {"status": result.get("status"), "losses": losses, "merge": None}
    report = place.run(name) / "FINAL" / "merge_report.json"
    if report.is_file():
        data["merge"] = json.loads(report.read_text())["holds"]
    finite = all(math.isfinite(loss) for loss in losses) and (bool(losses) or name.endswith("rounds"))
    good = result.get("status") == "finished" and finite and data["merge"] in (None, True)
    merged = "" if data["merge"] is None else f", merge {'holds' if data['merge'] else 'does not hold'}"
    return Result.of(good, f"{result.get('status')}, {len(losses)} steps{'' if finite else ', not finite'}{merged}", **data)


def out_of_memory(name: str, place: Place) -> Result:
    """A run that is out of memory ends with status 1 and one message that names keys; no traceback on the terminal."""
    hook = "+hooks.full={_target_: gpu.hooks.FullMemory}"
    done = place.train(name, "loss=dpo", *TINY, "checkpoint.every=null", "plugins=[gpu]", hook)
    said = done.stdout
    clear = "out of memory" in said and "train.microbatch_tokens=" in said and "Traceback" not in said
    if done.returncode != 1 or not clear:
        return Result.crash(done, "no clear message, ")
    message = next(line for line in said.splitlines() if "out of memory" in line)
    return Result.of(True, f"status 1: {message.strip()[:120]}...", message=message)
