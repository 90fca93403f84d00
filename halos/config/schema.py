"""Names and types of every key of a run. Values live in config/*.yaml, once, each with its reason beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


def key(
    *, above: float | None = None, least: float | None = None, most: float | None = None, one_of: tuple[str, ...] = ()
) -> Any:
    """A required key, with the range of its values: `above` is exclusive, `least` and `most` are inclusive."""
    limits = {"above": above, "least": least, "most": most, "one_of": one_of or None}
    return field(default=MISSING, metadata={name: limit for name, limit in limits.items() if limit is not None})


@dataclass
class Model:
    name_or_path: str | None = key()  # a directory, a hub id, a .gguf file, or `tiny`
    revision: str | None = key()
    dtype: str = key(one_of=("auto", "float32", "bfloat16", "float16"))
    attention: str = key(one_of=("auto", "segments", "flash_attention_2"))
    chat_template: str | None = key()
    add_tokens: list[str] = key()
    quantize: str | None = key(one_of=("4bit", "8bit"))


@dataclass
class Reference:
    name_or_path: str | None = key()
    revision: str | None = key()
    adapter: str = key(one_of=("start", "off"))  # what of a LoRA policy is on in its own reference


@dataclass
class Data:
    train: list[Any] = key()
    eval: list[Any] = key()
    root: str | None = key()
    score: str = key(one_of=("last", "all"))


@dataclass
class Peft:
    name: str = key(one_of=("none", "lora"))
    r: int = key(least=1)
    lora_alpha: float = key(above=0)
    lora_dropout: float = key(least=0, most=0.99)
    target_modules: Any = key()
    target_parameters: list[str] = key()
    bias: str = key(one_of=("none", "all", "lora_only"))
    use_rslora: bool = key()
    use_dora: bool = key()
    rank_pattern: dict[str, int] = key()
    alpha_pattern: dict[str, float] = key()
    modules_to_save: list[str] = key()
    init_from: str | None = key()  # the directory of an adapter to go on from


@dataclass
class Train:
    steps: int | None = key(least=1)
    epochs: float | None = key(above=0)
    batch_size: int = key(least=1)
    microbatch_size: int = key(least=1)
    max_length: int = key(least=2)
    truncation: str = key(one_of=("drop", "truncate", "error"))
    eval_every: int | None = key(least=1)
    eval_at_start: bool = key()
    log_every: int = key(least=1)
    max_grad_norm: float | None = key(above=0)
    max_bad_steps: int | None = key(least=1)
    precision: str = key(one_of=("auto", "float32", "bfloat16"))
    activation_checkpointing: bool = key()
    deterministic: bool = key()
    router_aux_loss: float | None = key(least=0)
    prove: str = key(one_of=("auto", "always", "off"))  # that the forward is the model's own
    early_stopping: int | None = key(least=1)
    temperature: float = key(above=0)  # of the softmax that log-probs are taken of


@dataclass
class Optim:
    name: str = key(one_of=("adamw", "adam", "sgd", "rmsprop"))
    lr: float = key(above=0, most=1e30)  # beyond, a step is no float32
    lr_by_peft: dict[str, float] = key()
    lr_from_scratch: dict[str, float] = key()
    betas: list[float] = key()
    eps: float = key(above=0)
    weight_decay: float = key(least=0)
    init_from: str | None = key()  # a checkpoint whose optimizer state a new run begins with


@dataclass
class Schedule:
    name: str = key(one_of=("constant", "linear", "cosine"))
    warmup: float = key(least=0)  # below 1 a share of all steps, from 1 on a number of steps
    final: float = key(least=0, most=1)  # what is left of the rate at the end, as a share


@dataclass
class Objective:
    metric: str = key()
    mode: str = key(one_of=("min", "max"))


@dataclass
class Sampler:
    name: str = key(one_of=("hf", "vllm", "openai"))
    temperature: float = key(above=0)
    top_p: float = key(above=0, most=1)
    top_k: int = key(least=0)
    max_new_tokens: int = key(least=1)
    batch_size: int = key(least=1)
    cache_tokens: int = key(least=64)
    python: str | None = key()
    url: str | None = key()
    model: str | None = key()
    concurrency: int = key(least=1)


@dataclass
class Labeller:
    name: str = key(one_of=("function", "reward_model", "judge"))
    functions: list[Any] = key()
    model: str | None = key()
    label: int | None = key(least=0)
    batch_size: int = key(least=1)
    processes: int = key(least=1)
    timeout: float = key(above=0)
    url: str | None = key()
    pairwise: bool = key()
    rubric: str | None = key()
    concurrency: int = key(least=1)
    max_requests: int | None = key(least=1)
    max_cost: float | None = key(above=0)
    price_in: float = key(least=0)
    price_out: float = key(least=0)


@dataclass
class Feedback:
    kind: str = key(one_of=("auto", "pairwise", "binary", "scalar"))
    pairing: str = key(one_of=("max", "random", "min"))
    threshold: Any = key()
    drop_equal: bool = key()


@dataclass
class Online:
    loss: str | None = key()
    overrides: list[str] = key()
    rounds: int = key(least=1)
    steps: int | None = key(least=1)
    prompts_per_round: int = key(least=1)
    samples_per_prompt: int = key(least=1)
    eval_prompts: int = key(least=0)
    sampler: Sampler = key()
    labeller: Labeller = key()
    feedback: Feedback = key()
    reference: str = key(one_of=("start", "last"))
    carry_optimizer: bool = key()
    keep_rounds: int | None = key(least=1)
    kl_samples: int = key(least=0)
    show: int = key(least=0)
    config_file: str | None = key()
    num_processes: int | None = key(least=1)


@dataclass
class Config:
    """A whole run. `loss`, `checkpoint` and `hooks` name a target and its own keys, which are checked against its signature."""

    loss: dict[str, Any] = key()
    model: Model = key()
    reference: Reference = key()
    data: Data = key()
    peft: Peft = key()
    train: Train = key()
    optim: Optim = key()
    schedule: Schedule = key()
    checkpoint: dict[str, Any] = key()
    hooks: dict[str, Any] = key()
    objective: Objective = key()
    exp_name: str | None = key()
    output_root: str = key()
    run_dir: str = key()
    cache_dir: str = key()
    seed: int = key(least=0, most=2**63 - 1)
    resume: str | None = key()
    resume_changes: str = key(one_of=("refuse", "allow"))
    overwrite: bool = key()
    dry_run: bool = key()
    plugins: list[str] = key()
    online: Online | None = None  # of loss=online alone, whose YAML has the section
