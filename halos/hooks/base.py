"""The protocol between the training loop and its hooks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
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
from halos.distributed.agreement import wait_for_all_ranks
from halos.distributed.moving_reference import MovingReference
from halos.distributed.strategy import Strategy
from halos.errors import UserError
from halos.logps.vocabulary import Vocabulary
from halos.metrics import Window
from halos.reward_kind import RewardKind
from halos.rundir import RunDir
from halos.schedules import LearningRates

Metrics = Mapping[str, Any]
Prompts = Sequence[str | Sequence[Mapping[str, str]]]  # each a user's text, or the turns of a dialogue


@dataclass(frozen=True, slots=True)
class Stop:
    """Why the loop ends before its last step, and whether the run counts as finished all the same. A run stopped by a signal
    (`signalled`) is meant to be resumed; one that stopped itself needs somebody to look at the reason."""

    reason: str
    finished: bool
    signalled: bool = False
    failed: bool = False  # its weights or data are broken: nothing more is saved


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run before its weights are loaded: all that can be reported and refused by then. A dry run ends with it."""

    config: Config
    directory: RunDir
    base: Path  # directory from which the base weights will be loaded
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    model: nn.Module  # with its adapter, on the meta device: names, shapes and dtypes, no values
    reward: RewardKind | None
    total_steps: int
    max_length: int
    main: bool
    optimizer_bytes: int  # size of the optimizer's state in a checkpoint
    lines: list[tuple[str, str]] = field(default_factory=list)  # lines that hooks add to the header: name and text


@dataclass
class Run:
    """The state of a run, as hooks see it."""

    config: Config
    directory: RunDir
    accelerator: Accelerator
    strategy: Strategy  # how the ranks hold the model: replicated or sharded
    module: nn.Module  # what the loop calls: a ModelWithHead, wrapped by the strategy
    model: nn.Module  # the transformers or PEFT model inside it
    base: Path  # directory from which the base weights were loaded
    vocabulary: Vocabulary  # the tokenizer's ids, and which of them were new to the base
    optimizer: Optimizer
    tokenizer: PreTrainedTokenizerBase
    reward: RewardKind | None  # of a reward model rather than a language model
    learning_rates: LearningRates  # of the parameter groups, set before each step
    total_steps: int
    max_length: int  # in tokens: train.max_length, or the model's number of positions where that is smaller
    unmeasured: frozenset[str] = frozenset()  # metrics that the evaluation data cannot give, so none will be expected
    content: ContentHashes | None = None  # hashes of its data and models; on rank 0
    step: int = 0
    examples: int = 0  # trained on so far, over all ranks, skipped steps included
    tokens: int = 0
    last_eval: dict[str, Any] = field(default_factory=dict)  # the latest evaluation's line of metrics.jsonl, step included
    last_train: dict[str, Any] = field(default_factory=dict)
    window: Window = field(default_factory=Window)  # metrics since the last logged step
    seconds_outside_training: dict[str, float] = field(default_factory=dict)  # since then, by name
    stop_requested: str | None = None  # the signal that this rank received; the ranks agree on `stop` once a step
    bad_steps: int = 0  # consecutive steps until now that were skipped, since loss or gradient were not finite
    skipped_steps: int = 0  # in total
    finite_at: int = -1  # the latest step whose weights are known to be good: loss and gradient were finite with them
    stop: Stop | None = None  # set by a hook, on every rank alike, or after a stop request
    failure: str | None = None  # why the run ends as "failed", where no exception says it
    microbatch_tokens: int | None = None  # the bound of a micro-batch: train.microbatch_tokens, or what its `auto` means
    activation_checkpointing: bool = False  # train.activation_checkpointing, or what its null means
    moving_reference: MovingReference | None = None  # a reference that follows the policy: reference.sync_every
    reference: dict[str, str] = field(default_factory=dict)  # key and content of the reference's log-probs, by names of rows
    reference_cpu_seconds: float = 0.0  # that this process spent on them before the first step
    hooks: dict[str, "Hook"] = field(default_factory=dict)
    rows_of_step: Callable[[int], list[str]] | None = None  # where the rows of a step came from; none of live ones
    generator: "Generator | None" = None  # what `generate` calls; None for a reward model
    resources: ExitStack = field(default_factory=ExitStack)  # closed when the loop ends, however it ends
    writers: dist.ProcessGroup | None = None  # process group for collectives of a background save; None: the default group

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def settings(self) -> Mapping[str, Any]:
        return asdict(self.config)

    @property
    def failed(self) -> bool:
        """Whether the run ends because its weights or data are broken: nothing more is saved."""
        return self._stop is not None and self._stop.failed

    @property
    def stopped_early(self) -> bool:
        """Whether the run ends before it is finished: it leaves a checkpoint, and no FINAL."""
        return self._stop is not None and not self._stop.finished

    @property
    def _stop(self) -> Stop | None:
        if not isinstance(self.stop, Stop | None):
            raise UserError(f"a hook has set run.stop to {self.stop!r}: set it to halos.hooks.base.Stop(reason, finished=...)")
        return self.stop

    def sync_stop_request(self) -> None:
        """All-reduce the stop request: saving needs every rank, so a signal to one stops all. Every rank calls."""
        requested = torch.tensor([float(bool(self.stop_requested))], device=self.accelerator.device)
        self.stop_if_requested(bool(self.accelerator.reduce(requested, reduction="sum").item()))

    def refuse_lone_stop(self) -> None:
        """Raises UserError where a hook has stopped the run on some ranks alone: the others wait for them in the next step."""
        if (stop := self._stop) is None or stop.signalled or stop.failed:  # these are of every rank
            return
        size = self.accelerator.num_processes
        if (come := wait_for_all_ranks(f"stop at step {self.step}")) < size:
            raise UserError(
                f"a hook set run.stop at step {self.step} ({stop.reason}), and {come} of {size} ranks stopped there: it must be"
                " set on all of them, at the same step"
            )

    def stop_if_requested(self, on_any_rank: bool) -> None:
        """Set `stop`; `on_any_rank` is the all-reduced request, the same on every rank."""
        if on_any_rank:
            self.stop = Stop(self.stop_requested or "another rank received a stop request", finished=False, signalled=True)

    def generate(self, prompts: Prompts, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> list[str]:
        """The policy's completion of each prompt (a user's text, or turns), without its end token; temperature 0 is greedy.

        Works under every strategy, between steps: every rank calls with the same prompts, samples a shard of them, and gets all
        completions. Weights, random number generators and train/eval modes are left unchanged. Raises UserError for a reward
        model, and for a prompt that leaves no room for `max_new_tokens`.
        """
        if self.generator is None:
            raise UserError("a reward model does not generate")
        return self.generator(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    def call_hooks(self, event: Callable[["Hook"], Any]) -> None:
        for hook in self.hooks.values():
            event(hook)


class Generator(Protocol):
    def __call__(self, prompts: Prompts, *, max_new_tokens: int, temperature: float, seed: int) -> list[str]: ...


class AnyRun(Protocol):
    """A training run or an online run of rounds, as hooks see either. Rounds have no model of their own: the training of each
    round is a run by itself."""

    @property
    def config(self) -> Config: ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """The configuration as a nested mapping."""
        ...

    @property
    def directory(self) -> RunDir: ...

    @property
    def main(self) -> bool: ...

    @property
    def step(self) -> int: ...


RunType = TypeVar("RunType", bound=AnyRun, contravariant=True, default=Run)


class Hook(Generic[RunType]):
    """Each method does nothing by default. Every rank runs every hook; guard output with `run.main`, never a collective, nor
    `run.stop`: a rank that stops alone leaves the others waiting for it.

    A plain `Hook` is for a training run. A `Hook[AnyRun]`, such as the trackers, uses only what online rounds have too; with
    loss=online the rounds call `on_start`, `on_eval`, `on_examples` and `on_end`, and keep the hook's state.
    """

    records: ClassVar[bool] = False  # `on_eval` passes metrics on and is called last, after all hooks that measure

    def check(self, planned: PlannedRun) -> None:
        """Before any weights are loaded, in dry runs too: raise UserError for whatever would fail later."""

    def on_start(self, run: RunType) -> None:
        """After any resume, before the first step."""

    def on_step(self, run: RunType, metrics: Metrics) -> None:
        """After a step, which `run.step` counts already. `metrics` is its line of metrics.jsonl, empty for steps not logged."""

    def on_eval(self, run: RunType, metrics: Metrics) -> Mapping[str, float] | None:
        """After an evaluation. Metrics that are returned become part of it: they are in metrics.jsonl, trackers and reports,
        and objective.metric may name one. Rank 0's return value counts, so all ranks may measure, or only rank 0."""

    def on_examples(self, run: RunType, examples: Sequence[Mapping[str, Any]]) -> None:
        """Samples of an online round or of a live run's evaluation, with their scores: `prompt`, `output`, `reward`, `split`."""

    def on_save(self, run: RunType, path: Path, *, final: bool) -> Callable[[], None] | None:
        """Write into `path`, which becomes visible once every hook on every rank is done.

        A hook with much to write may copy it and return a function that writes the copy. That is called next; with
        checkpoint.async_save in a background thread, where `run` has moved on and collectives must use `run.writers`.
        """

    def on_saved(self, run: RunType, checkpoint: Path, *, final: bool) -> None:
        """After the checkpoint is durable: retention, upload, pointers."""

    def on_end(self, run: RunType) -> None:
        """After the loop, however it ended."""

    def state_dict(self) -> dict[str, Any]:
        """State to keep across a resume: values by name that JSON returns as they are, else the run is refused."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def can_measure(hook: Hook[Any]) -> bool:
    """Whether its `on_eval` may return metrics."""
    return not hook.records and type(hook).on_eval is not Hook.on_eval


def call_on_eval(
    hooks: Mapping[str, Hook[Any]], run: AnyRun, metrics: Metrics, from_rank_0: Callable[[Any], Any] = lambda value: value
) -> dict[str, Any]:
    """Call `on_eval` of all hooks, those that record last. Return the metrics with those that hooks measured.

    `from_rank_0` broadcasts a value. Raises UserError for a return value that is no metric, or whose name is taken.
    """
    merged = dict(metrics)
    for name, hook in hooks.items():
        if can_measure(hook) and (measured := from_rank_0(hook.on_eval(run, merged))):
            merged |= _metrics_of(name, measured, merged)
    for hook in (hook for hook in hooks.values() if hook.records):
        hook.on_eval(run, merged)
    return merged


def states_of(hooks: Mapping[str, Hook[Any]]) -> dict[str, dict[str, Any]]:
    """Return the state of every hook. Raises UserError for one that JSON would change: a resumed run would get another."""
    states = {name: hook.state_dict() for name, hook in hooks.items()}
    for name, state in states.items():
        if not isinstance(state, dict):
            raise UserError(f"hooks.{name}: state_dict() is of type {type(state).__name__}: return a dict")
        if changed := _changed_by_json(state, "state_dict()"):
            raise UserError(f"hooks.{name}: {changed}: it is kept as JSON: numbers, text, lists, and dicts with text keys")
    return states


def _changed_by_json(value: Any, where: str) -> str | None:
    """Return which key or value inside `value` JSON would change, if any."""
    if isinstance(value, list | dict):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict) and not isinstance(key, str):
                return f"{where} has the key {key!r} of type {type(key).__name__}"
            if changed := _changed_by_json(each, f"{where}[{key!r}]"):
                return changed
        return None
    return None if value is None or isinstance(value, str | int | float) else f"{where} is of type {type(value).__name__}"


def _metrics_of(name: str, measured: Any, known: Metrics) -> dict[str, float]:
    if not isinstance(measured, Mapping):
        raise UserError(f"hooks.{name}: on_eval returned a {type(measured).__name__}: return metrics by name, or None")
    for metric, value in measured.items():
        if metric in known:
            raise UserError(f"hooks.{name} measures {metric}, which the evaluation has already: name it {name}/{metric}")
        if not isinstance(metric, str) or not isinstance(value, Real):
            raise UserError(f"hooks.{name} measures {metric} as {value!r}: a metric is a number with a name")
    return {metric: float(value) for metric, value in measured.items()}
