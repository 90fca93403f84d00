"""Schema of a run's configuration: the name, type and range of every key, and whether a resume may change it.

Default values are in config/*.yaml only, each with its reason next to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

from halos.config.keys import CONTENT, MATHEMATICS, MICROBATCH, OBJECTIVE, SAFE, SCORER, STEPS, Scope, key, record
from halos.config.rollout_modules import engine_names, scorer_names


@dataclass
class Model:
    name_or_path: str | None = key(on_resume=CONTENT, path=True)  # a directory, a hub id, a .gguf file, or `tiny`
    revision: str | None = key(on_resume=CONTENT)
    dtype: str = key(one_of=("auto", "float32", "bfloat16", "float16"))
    attention: str = key(one_of=("auto", "segments", "varlen", "flash_attention_2"))
    chat_template: str | None = key(on_resume=CONTENT, path=True)
    add_tokens: list[str] = key()
    quantize: str | None = key(one_of=("4bit", "8bit"))


@dataclass
class Reference:
    name_or_path: str | None = key(on_resume=CONTENT, path=True)
    revision: str | None = key(on_resume=CONTENT)
    adapter: str = key(one_of=("start", "off"))  # which adapter a LoRA policy's own reference has
    sync_every: int | None = key(least=1)
    sync_weight: float = key(above=0, most=1)
    cache: str = key(one_of=("auto", "always", "never"), on_resume=SAFE)  # up to the rounding of sums in another order
    export: str | None = key(on_resume=SAFE)  # a directory that rows with what a teacher says of them are written into


@dataclass
class Humanline:
    """Bounds of log(policy / reference) of a token, in nats."""

    low: float | None = key(most=0)
    high: float | None = key(least=0)


@dataclass
class Data:
    train: list[Any] = key(on_resume=CONTENT, path=True)
    eval: list[Any] = key(on_resume=CONTENT, path=True)  # keep_best and early stopping are measured on it
    eval_fraction: float | None = key(above=0, most=0.9)  # of the prompts of `train`, held out
    near_duplicates: float | None = key(above=0, most=1)  # similarity from which prompts are on one side
    root: str | None = key(on_resume=CONTENT, path=True)
    format: str | None = key(on_resume=CONTENT)  # of entries without one: a format of Source, or a user function
    reader: str | None = key(on_resume=CONTENT)  # of entries without one: a user function from a path to rows
    columns: dict[str, str | None] = key(on_resume=CONTENT)  # of entries without any: name -> that in the file, or null
    filter: str | None = key(on_resume=CONTENT)  # of entries without one: a condition on a row's columns
    schemas: bool = key(on_resume=CONTENT)  # whether columns of known schemas are recognised
    stream: bool = key()  # rows are read while the run trains
    stream_block: int = key(least=1)  # rows that are shuffled among each other
    weights: str = key(one_of=("share", "rows"))  # what the weights of entries of `train` are shares of
    score: str = key(one_of=("last", "all"))
    lost: str = key(one_of=("error", "drop", "keep"))  # of a row of which the chat template leaves out a part
    system: str = key(one_of=("keep", "merge"))  # merge: into the first user turn
    chat_template_kwargs: dict[str, Any] = key()  # what the chat template gets besides the turns
    date: str | None = key(on_resume=CONTENT)  # the day that the chat template writes as the current date

    @property
    def has_eval(self) -> bool:
        return bool(self.eval) or self.eval_fraction is not None


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
    init_from: str | None = key(on_resume=CONTENT, path=True)  # the directory of an adapter to start from


@dataclass
class Train:
    steps: int | None = key(least=1, on_resume=STEPS)
    epochs: float | None = key(above=0, on_resume=STEPS)
    batch_size: int = key(least=1)
    microbatch_size: int | None = key(least=1, on_resume=MICROBATCH)
    microbatch_tokens: int | str | None = key(least=1, words=("auto",), on_resume=MICROBATCH)
    share_prompts: bool = key(on_resume=MICROBATCH)
    max_length: int = key(least=2)
    truncation: str = key(one_of=("drop", "truncate", "error"))
    eval_every: int | None = key(least=1, on_resume=SAFE)
    eval_at_start: bool = key(on_resume=SAFE)
    log_every: int = key(least=1, on_resume=SAFE)
    max_grad_norm: float | None = key(above=0)
    max_bad_steps: int | None = key(least=1, on_resume=SAFE)  # it ends a run, and changes no step
    precision: str = key(one_of=("auto", "float32", "bfloat16"))
    activation_checkpointing: bool | None = key(on_resume=SAFE)
    deterministic: bool = key(on_resume=SAFE)
    compile: bool = key()
    working_weights: str = key(one_of=("microbatch", "step"), on_resume=SAFE)  # the same numbers
    router_aux_loss: float | None = key(least=0)
    prove: str = key(one_of=("auto", "always", "off"), on_resume=SAFE)  # it checks, and changes nothing
    early_stopping: int | None = key(least=1, on_resume=SAFE)  # it ends a run, and changes no step
    alarms: str = key(one_of=("off", "warn", "stop"), on_resume=SAFE)  # they change no step
    temperature: float = key(above=0)  # of the softmax that log-probs are computed from
    correction: str = key(one_of=("auto", "none", "truncate", "mask", "reject"))  # of rollouts whose sampler computes otherwise
    correction_level: str | None = key(one_of=("token", "sequence", "geometric"))
    correction_cap: float = key(least=1)
    correction_floor: float | None = key(least=0, most=1)


@dataclass
class Optim:
    """Keys that every optimizer has; further keys of the section are parameters of its `_target_`."""

    lr: float = key(above=0, most=1e30)  # a larger one overflows float32
    lr_by_peft: dict[str, float] = key()
    lr_from_scratch: dict[str, float] = key()
    lr_by_name: dict[str, float] = key()
    loraplus_lr_ratio: float | None = key(above=0)
    weight_decay: float = key(least=0)
    init_from: str | None = key(on_resume=CONTENT, path=True)  # a checkpoint whose optimizer state a new run starts from


@dataclass
class Objective:
    metric: str = key(on_resume=OBJECTIVE)
    mode: str = key(one_of=("min", "max"), on_resume=OBJECTIVE)


@dataclass
class Sampler:
    name: str = key(one_of=engine_names())
    temperature: float = key(least=0)  # 0: greedy, which training does not sample with
    top_p: float = key(above=0, most=1)
    top_k: int = key(least=0)
    max_new_tokens: int | None = key(least=1)
    batch_size: int = key(least=1, on_resume=SAFE)  # up to the rounding of sums in another order
    cache_tokens: int = key(least=64, on_resume=SAFE)
    python: str | None = key(on_resume=SAFE, path=True)
    url: str | None = key(on_resume=SAFE)
    model: str | None = key()
    concurrency: int | None = key(least=1, on_resume=SAFE)
    tensor_parallel: int = key(least=1, on_resume=SAFE)  # up to the rounding of sums in another order
    replicas: int = key(least=1, on_resume=SAFE)


@dataclass
class Scorer:
    name: str = key(one_of=scorer_names())
    functions: list[Any] = key()
    aggregation: str = key(one_of=("sum", "normalised"))
    model: str | None = key(on_resume=SCORER, path=True)  # of a judge, its name
    label: int | None = key(least=0)
    batch_size: int = key(least=1, on_resume=SAFE)
    processes: int = key(least=1, on_resume=SAFE)
    timeout: float = key(above=0)  # samples of a call that takes longer have no score
    url: str | None = key(on_resume=SAFE)
    pairwise: bool = key()
    rubric: str | None = key(on_resume=CONTENT, path=True)
    concurrency: int = key(least=1, on_resume=SAFE)
    max_requests: int | None = key(least=1, on_resume=SAFE)
    max_cost: float | None = key(above=0, on_resume=SAFE)
    price_in: float = key(least=0, on_resume=SAFE)
    price_out: float = key(least=0, on_resume=SAFE)


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
    rounds: int = key(least=1, on_resume=SAFE)  # no round depends on their number
    steps: int | None = key(least=1, on_resume=STEPS)
    minibatches: int = key(least=1)
    epochs: int = key(least=1)
    prompts_per_round: int | None = key(least=1)
    steps_per_round: int = key(least=1)
    samples_per_prompt: int = key(least=1)
    truncated: str = key(one_of=("keep", "mask", "drop"))
    eval_prompts: int = key(least=0)  # the objective is measured on them
    eval_samples: int = key(least=1)
    eval_temperature: float = key(least=0)
    pass_reward: float | None = key()
    sampler: Sampler = key()
    scorer: Scorer = key()
    feedback: Feedback = key()
    correction: str = key(one_of=("auto", "none", "truncate", "mask", "reject"))
    correction_level: str | None = key(one_of=("token", "sequence", "geometric"))
    correction_cap: float = key(least=1)
    correction_floor: float | None = key(least=0, most=1)
    reference: str = key(one_of=("start", "last"))
    carry_optimizer: bool = key()
    keep_rounds: int | None = key(least=1, on_resume=SAFE)
    keep_rollouts: int | None = key(least=0, on_resume=SAFE)
    kl_samples: int = key(least=0, on_resume=SAFE)
    rescore: int = key(least=0, on_resume=SAFE)
    show: int = key(least=0, on_resume=SAFE)
    config_file: str | None = key(on_resume=SAFE)
    num_processes: int | None = key(least=1, on_resume=SAFE)


@dataclass
class Config:
    """A whole run. `loss`, `optim`, `schedule`, `trainer`, `checkpoint` and each of `hooks` hold a `_target_` and its keys."""

    loss: dict[str, Any] = key()
    model: Model = key()
    reference: Reference = key()
    humanline: Humanline = key()
    data: Data = key()
    peft: Peft = key()
    train: Train = key()
    optim: dict[str, Any] = key(shared=Optim)
    schedule: dict[str, Any] = key()
    trainer: dict[str, Any] = key()
    checkpoint: dict[str, Any] = key(on_resume=SAFE)
    hooks: dict[str, Any] = key(on_resume=SAFE)
    objective: Objective = key()
    exp_name: str | None = key(scope=Scope.PLACE)
    output_root: str = key(scope=Scope.PLACE)
    run_dir: str = key(scope=Scope.PLACE)
    cache_dir: str = key(scope=Scope.HOST, on_resume=SAFE)
    seed: int = key(least=0, most=2**63 - 1)
    resume: str | None = key(scope=Scope.COMMAND)
    resume_changes: str = key(one_of=("refuse", "allow"), scope=Scope.COMMAND)
    overwrite: bool = key(scope=Scope.COMMAND)
    dry_run: bool = key(scope=Scope.COMMAND)
    dry_run_rows: int = key(least=1, scope=Scope.COMMAND)
    plugins: list[str] = key(scope=Scope.CODE)
    online: Online | None = None  # only with loss=online, whose YAML has the section
    loss_choice: str | None = record()  # the choice of config/loss that the run began with, where its function is that choice's


@cache
def key_facts() -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """Return every key that takes a value, with the metadata that `key` declared."""
    return tuple(_facts_of(Config, ""))


def mathematics(section: Any) -> dict[str, Any]:
    """Return the keys of a section that always change what is computed, with their values."""
    return {each.name: getattr(section, each.name) for each in fields(section) if each.metadata["on_resume"] == MATHEMATICS}


def path_keys() -> tuple[str, ...]:
    return tuple(key for key, facts in key_facts() if facts["path"])


def keys_of(*scopes: Scope) -> tuple[str, ...]:
    return tuple(key for key, facts in key_facts() if facts["scope"] in scopes)


def _facts_of(schema: Any, prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    hints = get_type_hints(schema)
    for each in fields(schema):
        kind = hints[each.name]
        section = next((part for part in (kind, *get_args(kind)) if is_dataclass(part)), None)
        if section:
            yield from _facts_of(section, f"{prefix}{each.name}.")
        else:
            yield prefix + each.name, each.metadata
            if shared := each.metadata.get("shared"):
                yield from _facts_of(shared, f"{prefix}{each.name}.")
