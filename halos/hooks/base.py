"""The protocol between the loop and everything that happens around it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypeVar  # with a default; torch brings it

from halos.config.content_hashes import ContentHashes
from halos.config.schema import Config
from halos.distributed.strategy import Strategy
from halos.errors import UserError
from halos.logps.vocabulary import Vocabulary
from halos.metrics import Window
from halos.rundir import RunDir
from halos.schedules import LearningRates

Metrics = Mapping[str, Any]
Asked = Sequence[str | Sequence[Mapping[str, str]]]  # what a user says, or turns of a dialogue


@dataclass(frozen=True, slots=True)
class Stop:
    """Why the loop ends before its last step, and whether the run counts as finished all the same. A run that was stopped by
    a signal is to be started again; of one that stops itself somebody must see why."""

    reason: str
    finished: bool
    signalled: bool = False
    failed: bool = False  # its weights or its data are broken: nothing more is saved


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A run before its weights are read: what can be told of it, and refused, by then. A dry run ends with it."""

    config: Config
    directory: RunDir
    base: Path  # the directory that its base weights will be read from
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    model: nn.Module  # with its adapter, on the meta device: names, shapes and dtypes without values
    reward: bool
    total_steps: int
    max_length: int
    main: bool
    optimizer_bytes: int  # that a checkpoint will hold of the optimizer
    lines: list[tuple[str, str]] = field(default_factory=list)  # that hooks add to the header: a name, and what there is to say


@dataclass
class Run:
    """What hooks see of a run."""

    config: Config
    directory: RunDir
    accelerator: Accelerator
    strategy: Strategy  # how the processes hold the model
    module: nn.Module  # what the loop calls: the log-prob module, as the strategy wrapped it
    model: nn.Module  # the transformers or PEFT model in it
    base: Path  # the directory its base weights were read from
    vocabulary: Vocabulary  # ids that the tokenizer has, and those that were new to the base
    optimizer: Optimizer
    tokenizer: PreTrainedTokenizerBase
    reward: bool  # a reward model rather than a language model
    learning_rates: LearningRates  # of the parameter groups, set before each step
    total_steps: int
    max_length: int  # tokens of a row: train.max_length, or the model's positions where they are fewer
    unmeasured: frozenset[str] = frozenset()  # metrics that the held-out rows cannot give, and nobody is to wait for
    content: ContentHashes | None = None  # what it stands on; on the first process
    step: int = 0
    examples: int = 0  # read so far, over all processes, those of skipped steps too
    tokens: int = 0
    last_eval: dict[str, Any] = field(default_factory=dict)  # the newest evaluation's row, its step included
    last_train: dict[str, Any] = field(default_factory=dict)
    window: Window = field(default_factory=Window)  # metrics since the last logged step
    stop_requested: str | None = None  # the signal that this rank received; the ranks agree on `stop` at the end of a step
    bad_steps: int = 0  # in a row up to now whose loss or gradient was not finite, and which were skipped
    skipped_steps: int = 0  # so far
    finite_at: int = -1  # the newest step whose weights are known to be good: a loss and its gradient were finite with them
    stop: Stop | None = None  # set by a hook, on every rank alike, or after a stop request
    failure: str | None = None  # why the run ends "failed" although it trained to its end
    hooks: dict[str, "Hook"] = field(default_factory=dict)
    generator: "Generator | None" = None  # what `generate` calls; None for a reward model
    writers: dist.ProcessGroup | None = None  # the processes' own group for what is written beside the steps; None: the default

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def settings(self) -> Mapping[str, Any]:
        return asdict(self.config)

    @property
    def failed(self) -> bool:
        """Whether it ends here since its weights, or its data, are broken: it leaves nothing new."""
        return self.stop is not None and self.stop.failed

    @property
    def stopped_early(self) -> bool:
        """Whether the run ends before it is finished: it leaves a checkpoint, and no FINAL."""
        return self.stop is not None and not self.stop.finished

    def sync_stop_request(self) -> None:
        """All-reduce the stop request: saving needs every rank, so a signal to one stops all. Every rank calls."""
        requested = torch.tensor([float(bool(self.stop_requested))], device=self.accelerator.device)
        self.stop_if_requested(bool(self.accelerator.reduce(requested, reduction="sum").item()))

    def stop_if_requested(self, on_any_rank: bool) -> None:
        """Set `stop`; `on_any_rank` is the all-reduced request, the same on every rank."""
        if on_any_rank:
            self.stop = Stop(self.stop_requested or "another process was told to stop", finished=False, signalled=True)

    def generate(self, prompts: Asked, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> list[str]:
        """The policy's completion of each prompt (text for its user, or turns), without its end token; 0 takes the likeliest
        token each time. Under every strategy, between steps: every process calls with the same prompts, samples its share of
        them, and gets all. Weights, random numbers and modes are afterwards what they were.

        Raises UserError for a reward model, which says nothing, and for a prompt that leaves no room.
        """
        if self.generator is None:
            raise UserError("a reward model does not generate")
        return self.generator(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    def call_hooks(self, event: Callable[["Hook"], Any]) -> None:
        for hook in self.hooks.values():
            event(hook)


class Generator(Protocol):
    def __call__(self, prompts: Asked, *, max_new_tokens: int, temperature: float, seed: int) -> list[str]: ...


class Watched(Protocol):
    """What a training run and online rounds both are to a hook. Rounds have no model of their own: it belongs to each round's
    training, which is a run by itself."""

    @property
    def config(self) -> Config: ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What is trained, key by key."""
        ...

    @property
    def directory(self) -> RunDir: ...

    @property
    def main(self) -> bool: ...

    @property
    def step(self) -> int: ...


Seen = TypeVar("Seen", bound=Watched, contravariant=True, default=Run)


class Hook(Generic[Seen]):
    """Each method does nothing by default. Every process runs every hook; guard output with `run.main`, never a collective.

    A plain `Hook` is of a training run. `Hook[Watched]`, as the trackers are, asks for no more than online rounds have too;
    rounds (`hooks` beside loss=online) call `on_start`, `on_eval`, `on_examples` and `on_end`, and keep its state.
    """

    records: ClassVar[bool] = False  # `on_eval` passes metrics on: it is called when all that measure have

    def check(self, blueprint: Blueprint) -> None:
        """Before any weights are read, in dry runs too: raise UserError for what could not work in the end."""

    def on_start(self, run: Seen) -> None:
        """After any resume, before the first step."""

    def on_step(self, run: Seen, metrics: Metrics) -> None:
        """After a step; `run.step` counts it. `metrics` is its line of metrics.jsonl, empty between logged steps."""

    def on_eval(self, run: Seen, metrics: Metrics) -> Mapping[str, float] | None:
        """After an evaluation. What is given back, metrics by name, is part of it from then on: in metrics.jsonl, trackers and
        reports, and objective.metric may be one. Of several processes the first one's counts, so all may measure, or it alone.
        """

    def on_examples(self, run: Seen, examples: Sequence[Mapping[str, Any]]) -> None:
        """Samples with their scores, of an online round or of a live run's evaluation: `prompt`, `output`, `reward`, `split`."""

    def on_save(self, run: Seen, path: Path, *, final: bool) -> Callable[[], None] | None:
        """Write into `path`; it becomes visible when every hook and every process is done.

        A hook that has much to write may copy it and give back what writes it: that is called next, with
        checkpoint.async_save in a thread beside the steps, where `run` has moved on and `run.writers` is the group to use.
        """

    def on_saved(self, run: Seen, checkpoint: Path, *, final: bool) -> None:
        """After the checkpoint is durable: retention, upload, pointers."""

    def on_end(self, run: Seen) -> None:
        """However the loop ended."""

    def state_dict(self) -> dict[str, Any]:
        """What the hook must remember across a resume; JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


def measures(hook: Hook[Any]) -> bool:
    """Whether what it gives back from `on_eval` may be metrics."""
    return not hook.records and type(hook).on_eval is not Hook.on_eval


def evaluated(
    hooks: Mapping[str, Hook[Any]], run: Watched, metrics: Metrics, of_first: Callable[[Any], Any] = lambda mine: mine
) -> dict[str, Any]:
    """The metrics of an evaluation with those that hooks measure; all hooks are told, those that record after the others.

    `of_first`: what the first process has, for every process. Raises UserError for what is no metric, or measured already.
    """
    whole = dict(metrics)
    for name, hook in hooks.items():
        if measures(hook) and (more := of_first(hook.on_eval(run, whole))):
            whole |= _metrics_of(name, more, whole)
    for hook in (hook for hook in hooks.values() if hook.records):
        hook.on_eval(run, whole)
    return whole


def _metrics_of(name: str, measured: Any, known: Metrics) -> dict[str, float]:
    if not isinstance(measured, Mapping):
        raise UserError(f"hooks.{name}: on_eval gives back a {type(measured).__name__}: give metrics by name, or None")
    for metric, value in measured.items():
        if metric in known:
            raise UserError(f"hooks.{name} measures {metric}, which is measured already: call it {name}/{metric}")
        if not isinstance(metric, str) or not isinstance(value, Real):
            raise UserError(f"hooks.{name} measures {metric} as {value!r}: a metric is a number under a name")
    return {metric: float(value) for metric, value in measured.items()}
