"""The token budget of a micro-batch, and whether activations are checkpointed, where that is left to the GPU's memory."""

import logging
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils._pytree import tree_leaves

from halos.config import run_config
from halos.data.collate import pack_on_host
from halos.data.dataset import Dataset
from halos.examples import Completion, PackRow
from halos.hooks.base import Run
from halos.logps.working_weights import kept_casts
from halos.run.models import checkpoint_activations
from halos.trainers.memory import TRIED, is_out_of_memory
from halos.trainers.microbatches import Bounds

log = logging.getLogger(__name__)

ON_CPU = 1024  # tokens: more is no faster, and takes more memory
UNTRIED = 4096  # tokens on a GPU where a trial cannot run
LEAST, MOST = 1024, 65_536  # tokens on a GPU: fewer leave it idle, more are no faster
TRIALS = (TRIED // 2, TRIED)  # tokens of the two micro-batches that are tried
SHARE = 0.8  # of the free memory: the allocator's fragments, a longer row than those tried, and the loss take the rest


class DeviceMemory(Protocol):
    """The memory of this rank's device."""

    def free(self) -> int:
        """Bytes that this process may still allocate."""
        ...

    def start(self) -> None:
        """Forget the peak so far."""
        ...

    def peak(self) -> int:
        """Bytes allocated at the peak since `start`, besides those allocated then."""
        ...


class CudaMemory:
    """The memory of a GPU, as torch's allocator sees it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0

    def free(self) -> int:
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + unused

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes that a micro-batch takes at its peak."""

    fixed: float
    per_token: float

    @classmethod
    def of(cls, peaks: tuple[int, int]) -> "Cost":
        """From the peaks of TRIALS; memory that does not grow with the tokens, such as gradients, is fixed."""
        per_token = max(1.0, (peaks[1] - peaks[0]) / (TRIALS[1] - TRIALS[0]))
        return cls(max(0.0, peaks[0] - per_token * TRIALS[0]), per_token)

    def fitting(self, memory: float) -> float:
        """The tokens of the largest micro-batch that fits into this many bytes."""
        return (SHARE * memory - self.fixed) / self.per_token


def on_grid(fitting: float) -> int:
    """The largest number of a grid, 2^k or 3 * 2^k, of up to `fitting` tokens, within LEAST and MOST: neither a few bytes nor
    another GPU of the same kind changes it."""
    if fitting < LEAST:
        return LEAST
    power = 2 ** int(math.log2(fitting))
    return min(MOST, power * 3 // 2 if power * 3 // 2 <= fitting else power)


def settle(run: Run, optimizer_bytes: int, longest: int, memory: DeviceMemory | None = None) -> dict[str, Any]:
    """Set the run's token budget, and whether it checkpoints activations: as typed, or where that is `auto` and null as measured,
    the same on every rank. What was not typed is returned for the record of the attempt, and is as the run's earlier attempts
    have recorded it, so that no resume on another machine changes a step.

    `optimizer_bytes`: of the optimizer's whole state, which a new run does not have yet. `longest`: tokens of the longest item.
    """
    train, is_cuda = run.config.train, run.accelerator.device.type == "cuda"
    leaves_tokens, leaves_checkpointing = isinstance(train.microbatch_tokens, str), train.activation_checkpointing is None
    attempts = run.directory.read_attempts() if run.config.resume else {}
    known, checkpointed = gather_object(
        [(run_config.recorded_budget(attempts), run_config.recorded_checkpointing(attempts))]
    )[0]  # fmt: skip
    run.microbatch_tokens = train.microbatch_tokens if not isinstance(train.microbatch_tokens, str) else known
    run.activation_checkpointing = bool(train.activation_checkpointing)
    if leaves_checkpointing and checkpointed:
        _checkpoint_activations(run)
    if is_cuda and memory is None:
        memory = CudaMemory(run.accelerator.device)
    decides = leaves_checkpointing and checkpointed is None
    if memory is not None and run.strategy.takes_trials and (decides or (leaves_tokens and known is None)):
        fitting = _measured(run, optimizer_bytes, max(longest, run.microbatch_tokens or 0), memory, decides=decides)
        run.microbatch_tokens = on_grid(fitting) if leaves_tokens and known is None else run.microbatch_tokens
        checkpointed = run.activation_checkpointing
    if leaves_tokens:
        run.microbatch_tokens = min(gather_object([run.microbatch_tokens or (UNTRIED if is_cuda else ON_CPU)]))
        if run.main:
            log.info("%-10s %d tokens in a micro-batch", "budget", run.microbatch_tokens)
    settled = {run_config.BUDGET: run.microbatch_tokens} if leaves_tokens else {}
    is_settled = leaves_checkpointing and checkpointed is not None
    return settled | ({run_config.CHECKPOINTING: checkpointed} if is_settled else {})


def longest_item(rows: Any, bounds: Bounds, max_length: int) -> int:
    """The tokens that a micro-batch of one item has at most; of rows that are not known yet, those of one completion."""
    if not isinstance(rows, Dataset):
        return max_length
    own, trunks = bounds.tokens_of(rows, np.arange(len(rows)))
    return int((own + trunks).max(initial=0))


def _measured(run: Run, optimizer_bytes: int, needed: int, memory: DeviceMemory, *, decides: bool) -> float:
    """The tokens that fit on this rank; where it `decides`, with activations checkpointed if on some rank those `needed` do not
    fit. Every rank calls."""
    ranks = 1 if run.strategy.parameter_layout == "whole" else run.accelerator.num_processes
    ahead = 0 if run.optimizer.state else optimizer_bytes // ranks
    fitting = _fitting(run, ahead, memory, may_fail=decides and run.accelerator.num_processes == 1)  # else others would wait
    if decides and (least := min(gather_object([fitting]))) < needed:
        if run.main:
            log.info("%-10s checkpointed: %d tokens fit, and a micro-batch may have %d", "activations", max(0, least), needed)
        _checkpoint_activations(run)
        fitting = _fitting(run, ahead, memory)
    return fitting


def _checkpoint_activations(run: Run) -> None:
    checkpoint_activations(run.model)
    run.activation_checkpointing = True


def _fitting(run: Run, ahead: int, memory: DeviceMemory, *, may_fail: bool = False) -> float:
    """The tokens that fit besides `ahead` bytes, by trials; if they `may_fail`, none where there is no memory for a trial."""
    free, devices = memory.free() - ahead, [run.accelerator.device] if run.accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            _peak(run, TRIALS[0], memory)  # once more than is measured: libraries allocate workspaces that stay
            cost = Cost.of((_peak(run, TRIALS[0], memory), _peak(run, TRIALS[1], memory)))
    except Exception as error:
        if not may_fail or not is_out_of_memory(error):
            raise
        run.strategy.zero_grad(run.optimizer)
        return 0.0
    log.debug("%.0f bytes a token, %.0f besides, %.0f free", cost.per_token, cost.fixed, free)
    return cost.fitting(free)


def _peak(run: Run, tokens: int, memory: DeviceMemory) -> int:
    """The peak of a forward and a backward pass over so many tokens; weights stay as they are."""
    strategy, module, training = run.strategy, run.module, run.module.training
    module.train()
    memory.start()
    batch = pack_on_host(_rows(tokens, run)).to(run.accelerator.device)
    with kept_casts(run.config.train.working_weights == "step"):
        with run.accelerator.autocast():
            outputs = [leaf for leaf in tree_leaves(module(batch)) if leaf.requires_grad]
        strategy.backward(module, torch.stack([leaf.float().mean() for leaf in outputs]).sum(), last=True)
        peak = memory.peak()
    strategy.zero_grad(run.optimizer)
    module.train(training)
    return peak


def _rows(tokens: int, run: Run) -> list[PackRow]:
    """Rows of random tokens, as long as any may be, of which three quarters are scored: more than of most data."""
    vocabulary, random = len(run.tokenizer), np.random.default_rng(0)
    lengths = [min(run.max_length, tokens - start) for start in range(0, tokens, run.max_length)]
    rows = [random.integers(0, vocabulary, length, dtype=np.int32) for length in lengths]
    return [(row[: len(row) // 4], Completion(row[len(row) // 4 :], np.ones(len(row) - len(row) // 4, bool))) for row in rows]
