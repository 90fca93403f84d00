"""Estimates of a prepared run of a data set before it reads weights: its memory by part, and its time."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from halos.config.reference_checks import has_reference
from halos.data.dataset import Dataset
from halos.distributed.parameters import num_elements
from halos.inspection import activations, speed
from halos.inspection.activations import Activations
from halos.inspection.facts import Fact
from halos.inspection.memory import Memory
from halos.inspection.steps import Steps, longest_batches
from halos.logps import lora_linear
from halos.logps.head import logits_at_once
from halos.logps.model import bare
from halos.run.batch_source import DatasetSource
from halos.run.prepare import PreparedRun
from halos.run.reference import visited
from halos.run.token_budget import ON_CPU, UNTRIED
from halos.trainers.microbatches import Bounds
from halos.trainers.reference_rows import bounds, cut

TEMPORARIES = 2  # of the size of the largest trained parameter, that an optimizer makes which is not fused
CHUNKS = 2  # of logits at once: logsumexp makes a second one
HEAP = 0.6  # of the activations, which glibc keeps between blocks of other sizes: measured by launch/results/dry_run_memory.py


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The largest micro-batch of a run."""

    tokens: int  # that are computed
    attended: int  # by branches beyond the first of a shared prompt, the prompt's tokens counted for each
    scored: int
    alone: bool  # in its batch


class Estimate:
    """Memory and time of a run on a data set. The model's structure is used up."""

    def __init__(self, run: PreparedRun, accelerator: Accelerator) -> None:
        assert isinstance(run.batches, DatasetSource)
        rows = run.batches.train.rows
        assert isinstance(rows, Dataset)
        self.run, self.accelerator, self.rows, self.order = run, accelerator, rows, run.batches.order
        self.device, model = accelerator.device, run.structure.model
        self.full = run.config.peft.name == "none"
        self.weights = sum(map(_bytes, model.parameters())) + sum(map(_bytes, model.buffers()))
        self.trained = [_bytes(each) for each in model.parameters() if each.requires_grad]
        text = bare(model).config.get_text_config()
        self.vocabulary, self.width = int(text.vocab_size), int(text.hidden_size)
        head: Any = bare(model).get_output_embeddings()
        weight = getattr(head, "weight", None)
        self.trains_head = isinstance(weight, nn.Parameter) and weight.requires_grad
        self.reads_logits = run.loss.reward is None
        train, shares = run.config.train, run.structure.verdict.plan.shares
        tokens = train.microbatch_tokens if isinstance(train.microbatch_tokens, int | None) else _automatic(self.device)
        self.bounds = Bounds(train.microbatch_size, tokens, train.share_prompts and shares)
        lora_linear.fuse(model)  # as in a run
        self.activations = activations.of(model, self.device)

    @property
    def refers(self) -> bool:
        """Whether a reference computes."""
        return has_reference(self.run.config, self.run.loss)

    def memory(self) -> Memory | None:
        """Return the memory of one process; None for sharded or quantised weights, and an unusual forward."""
        if self.activations is None or self.run.strategy.is_sharded or self.run.config.model.quantize:
            return None
        batch, config = self.largest(), self.run.config
        copies = self.full and self.refers and config.reference.cache != "always"
        named = self.run.structure.reference is not None and config.reference.cache != "always"
        kept, working = self._kept(self.activations, batch), self.activations.working * batch.tokens
        keeps_heap = self.device.type == "cpu" and platform.libc_ver()[0] == "glibc"
        fused = config.optim.get("fused") in (True, "auto") and self.device.type == "cuda"
        return Memory(
            libraries=_resident() if self.device.type == "cpu" else 0,
            weights=self.weights,
            optimizer=self.run.planned.optimizer_bytes,
            reference=self.weights if copies or named else 0,
            gradients=sum(self.trained),
            activations=round(kept),
            working=round(working),
            head=self._head(batch),
            accumulates=not batch.alone,
            stepping=0 if fused else TEMPORARIES * max(self.trained, default=0),
            heap=round(HEAP * (kept + working)) if keeps_heap else 0,
            beforehand=self._beforehand(self.activations, keeps_heap) if config.reference.cache == "always" else 0,
        )

    def _beforehand(self, each: Activations, keeps_heap: bool) -> int:
        """Of the pass over the reference, whose batches have bounds of their own: the layers, and then the head."""
        tokens, scored = self._largest_of_pass()
        head = CHUNKS * self._chunk(scored) + (tokens + scored) * self.width * 4
        peak = max(each.forward * tokens, head)
        return round(peak * (1 + HEAP)) if keeps_heap else round(peak)

    def _largest_of_pass(self) -> tuple[int, int]:
        """Return the tokens that are computed and those that are scored in the largest batch of the pass over the reference."""
        train, lengths = self.run.config.train, self.rows.lengths
        read = visited(self.run)
        items = np.arange(len(lengths)) if read is None else read
        sizes, scored = lengths[items].ravel(), self.rows.scored[items].ravel()
        checkpointed = bool(train.activation_checkpointing)
        cuts = cut(sizes.tolist(), *bounds(train, self.bounds.tokens, lengths.shape[1], is_checkpointed=checkpointed))
        largest = max(cuts, key=lambda batch: int(sizes[batch].sum()))
        held = np.unique(items[largest // lengths.shape[1]])
        return min(self._computed(held), int(sizes[largest].sum())), int(scored[largest].sum())

    def _chunk(self, scored: int) -> int:
        return min(scored, max(1, logits_at_once(self.device) // self.vocabulary)) * self.vocabulary * 4

    @property
    def _layers(self) -> int:
        return int(getattr(bare(self.run.structure.model).config.get_text_config(), "num_hidden_layers", 1))

    def _kept(self, each: Activations, batch: MicroBatch) -> float:
        kept = each.kept * batch.tokens + each.kept_by_branches * batch.attended
        if not self.run.config.train.activation_checkpointing:
            return kept
        return kept / self._layers + 4 * self.width * batch.tokens * self._layers  # one layer, and the input of each

    def _head(self, batch: MicroBatch) -> int:
        if not self.reads_logits:
            return 0
        chunk = self._chunk(batch.scored)
        gradient = self.vocabulary * self.width * 4 if self.trains_head else 0
        return max(CHUNKS * chunk, chunk + gradient) + 2 * batch.scored * self.width * 4

    def largest(self) -> MicroBatch:
        """Return the micro-batch with the most tokens."""
        best, alone = (0, np.zeros(0, np.int64)), True
        for indices in longest_batches(self.rows, self.order, self.run.batches.total):
            for positions in (parts := self.bounds.deal(self.rows, indices, self.accelerator.num_processes)[0]):
                if (tokens := self._computed(indices[positions])) > best[0]:
                    best, alone = (tokens, indices[positions]), len(parts) == 1
        tokens, chosen = best
        prompts, lengths = self.rows.prompt_lengths[chosen], self.rows.lengths[chosen]
        attended = int(lengths[:, 1:].sum()) if self.bounds.share else 0
        assert len(prompts) == len(lengths)
        return MicroBatch(tokens, attended, int(self.rows.scored[chosen].sum()), alone)

    def _computed(self, rows: np.ndarray) -> int:
        """The tokens that the model computes of some rows: a prompt that they share once."""
        own, trunks = self.bounds.tokens_of(self.rows, rows)
        _, first = np.unique(self.rows.groups[rows], return_index=True)
        return int(own.sum() + trunks[first].sum())

    # --- time ----------------------------------------------------------------------------------------------------------

    def time(self, steps: Steps) -> list[Fact]:
        """Return facts on the time of the training steps, from a matrix product's rate on this device now."""
        if self.activations is None:
            return []
        own, trunks = self.bounds.tokens_of(self.rows, np.arange(len(self.rows)))
        share = float(own.sum() + trunks.sum()) / float(self.rows.lengths.sum())
        tokens, scored = steps.all_tokens * share, steps.scored * steps.all_tokens / steps.tokens
        read = visited(self.run)
        once = share * float(self.rows.lengths[... if read is None else read].sum())
        flops = self.flops(tokens, scored, once=once)
        half = self.accelerator.mixed_precision == "bf16"
        dtype = torch.bfloat16 if half else torch.float32
        rate = speed.gemm_rate(self.width, 4 * self.width, dtype, self.device)
        seconds = speed.seconds_of(flops, rate, self.device) / self.accelerator.num_processes
        step = f"{seconds / max(1, steps.total):.3g} s a step, without evaluation and checkpoints"
        reached = f"if {speed.share_of(self.device):.0%} of the rate of a matrix product here now, {rate / 1e9:,.0f} GFLOP/s,"
        note = f"{step}, {reached} are reached"
        return [Fact("time of the steps", f"about {speed.readable(seconds)}", note)]

    def flops(self, tokens: float, scored: float, *, once: float) -> float:
        """FLOPs of a run: forward, backward, and the reference's forward, over `once` tokens where its log-probs are kept."""
        assert self.activations is not None
        train, logit = self.run.config.train, 2.0 * self.width * self.vocabulary if self.reads_logits else 0.0
        passes = (3 if self.full else 2) + bool(train.activation_checkpointing)
        flops = tokens * self.activations.flops * passes + scored * logit * (4 if self.trains_head else 2)
        if self.refers:
            part = once / tokens if self.run.config.reference.cache == "always" else 1.0
            flops += part * (tokens * self.activations.flops + scored * logit)
        return flops


def _automatic(device: torch.device) -> int:
    return UNTRIED if device.type == "cuda" else ON_CPU


def _bytes(tensor: torch.Tensor) -> int:
    return num_elements(tensor) * tensor.element_size()


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0
