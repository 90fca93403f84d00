"""The token budget of a micro-batch, where train.microbatch_tokens=auto: on a GPU what fits into its memory, measured."""

import logging
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils._pytree import tree_leaves

from halos.config import run_config
from halos.data.collate import pack_on_host
from halos.examples import Completion, PackRow
from halos.hooks.base import Run
from halos.trainers.memory import TRIED

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

    def tokens_in(self, memory: float) -> int:
        """The largest number of a grid, 2^k or 3 * 2^k, whose micro-batch fits, within LEAST and MOST: neither a few bytes nor
        another GPU of the same kind changes it."""
        fitting = (SHARE * memory - self.fixed) / self.per_token
        if fitting < LEAST:
            return LEAST
        power = 2 ** int(math.log2(fitting))
        return min(MOST, power * 3 // 2 if power * 3 // 2 <= fitting else power)


def settle(run: Run, optimizer_bytes: int, memory: DeviceMemory | None = None) -> int | None:
    """Set the run's token budget: the typed one, or where that is `auto` one that is the same on every rank, which is returned.
    It is as the run's earlier attempts have recorded it, so that no resume on another machine changes a step.

    `optimizer_bytes`: of the optimizer's whole state, which a new run does not have yet.
    """
    if not isinstance(typed := run.config.train.microbatch_tokens, str):
        run.microbatch_tokens = typed
        return None
    recorded = run_config.recorded_budget(run.directory.read_attempts()) if run.config.resume else None
    tokens = gather_object([recorded])[0]
    if is_cuda := run.accelerator.device.type == "cuda":
        memory = memory or CudaMemory(run.accelerator.device)
    if tokens is None and memory is not None and run.strategy.takes_trials:
        tokens = _measured(run, optimizer_bytes, memory)
    run.microbatch_tokens = min(gather_object([tokens or (UNTRIED if is_cuda else ON_CPU)]))
    if run.main:
        log.info("%-10s %d tokens in a micro-batch", "budget", run.microbatch_tokens)
    return run.microbatch_tokens


def _measured(run: Run, optimizer_bytes: int, memory: DeviceMemory) -> int:
    """The tokens that fit on this rank. Every rank calls."""
    ranks = 1 if run.strategy.parameter_layout == "whole" else run.accelerator.num_processes
    free = memory.free() - (0 if run.optimizer.state else optimizer_bytes // ranks)
    devices = [run.accelerator.device] if run.accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        _peak(run, TRIALS[0], memory)  # once more than is measured: libraries allocate workspaces that stay
        cost = Cost.of((_peak(run, TRIALS[0], memory), _peak(run, TRIALS[1], memory)))
    tokens = cost.tokens_in(free)
    log.debug("%.0f bytes a token, %.0f besides, %.0f free: %d tokens", cost.per_token, cost.fixed, free, tokens)
    return tokens


def _peak(run: Run, tokens: int, memory: DeviceMemory) -> int:
    """The peak of a forward and a backward pass over so many tokens; weights stay as they are."""
    strategy, module, training = run.strategy, run.module, run.module.training
    module.train()
    memory.start()
    batch = pack_on_host(_rows(tokens, run)).to(run.accelerator.device)
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
