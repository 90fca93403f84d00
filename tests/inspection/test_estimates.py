"""Estimates of memory and work: from shapes alone, and equal to what real tensors take."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from halos.config.schema import Config
from halos.data.collate import pack
from halos.distributed.launch import make_accelerator
from halos.examples import Completion, PackRow
from halos.inspection import activations, speed
from halos.inspection.memory import Memory
from halos.inspection.steps import Steps
from halos.logps import lora_linear
from halos.logps.hidden import hidden_states
from halos.logps.model import bare
from halos.logps.modes import adapter_off
from halos.run import reference
from halos.run.batch_source import DatasetSource
from halos.run.estimate import Estimate
from halos.run.prepare import PreparedRun, prepare
from halos.transfer import pinned


@pytest.fixture
def prepared_run(configure: Callable[..., Config]) -> Callable[..., PreparedRun]:
    """`prepared_run("loss=dpo", ...)`: a run before it reads weights."""

    def make(*words: str) -> PreparedRun:
        config = configure(*words)
        return reference.decided(prepare(config, make_accelerator(config.train.precision, config.model.dtype), None))

    return make


def bytes_kept(model: nn.Module, rows: list[PackRow]) -> int:
    """Bytes of the tensors that a real forward pass saves for its backward pass, parameters aside."""
    own, saved = {each.untyped_storage().data_ptr() for each in model.parameters()}, dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = hidden_states(bare(model), pack(rows, share=True))  # alive until the bytes are counted
    assert kept.requires_grad
    return sum(saved.values())


def bytes_at_peak(model: nn.Module, rows: list[PackRow]) -> int:
    """Bytes that torch's allocator has given out at the peak of a real forward pass without gradients."""
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profiled:
        hidden_states(bare(model), pack(rows, share=True))
    found: Any = profiled.profiler
    return max(accumulate(each.nbytes() for each in found.kineto_results.events() if each.name() == "[memory]"))


def test_tensors_without_storage_are_not_pinned_for_a_gpu() -> None:
    with FakeTensorMode():
        values = torch.empty(3)
        assert pinned(values, torch.device("cuda")) is values


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_activations_estimated_from_shapes_are_those_of_a_real_forward_pass(
    peft: str, prepared_run: Callable[..., PreparedRun]
) -> None:
    run = prepared_run("loss=sft", f"peft={peft}")
    lora_linear.fuse(run.structure.model)  # as a run does
    real = run.structure.model.to_empty(device="cpu").train()
    with torch.no_grad():
        for each in [*real.parameters(), *real.buffers()]:
            each.normal_() if each.is_floating_point() else each.zero_()

    def row(prompt: int, completion: int) -> PackRow:
        ids = np.arange(prompt + completion, dtype=np.int32) % 50
        return ids[:prompt], Completion(ids[prompt:], np.ones(completion, bool))

    alone, shared = bytes_kept(real, [row(60, 40)]), bytes_kept(real, [row(60, 40)] * 2)
    found = activations.of(prepared_run("loss=sft", f"peft={peft}").structure.model, torch.device("cpu"))
    assert found is not None
    assert 100 * found.kept == pytest.approx(alone, rel=0.1)
    assert 140 * found.kept + 100 * found.kept_by_branches == pytest.approx(shared, rel=0.1)
    with adapter_off(real):
        assert 300 * found.forward == pytest.approx(bytes_at_peak(real.eval(), [row(150, 150)]), rel=0.1)
    assert found.flops > 0
    assert found.working > 0


def test_the_parts_of_a_run_are_those_of_its_shapes_and_its_largest_micro_batch(
    prepared_run: Callable[..., PreparedRun], configure: Callable[..., Config]
) -> None:
    run = prepared_run("loss=dpo", "train.microbatch_size=3", "train.batch_size=8", "reference.cache=never")
    estimate = Estimate(run, accelerator := make_accelerator("float32", "float32"))
    memory, count = estimate.memory(), sum(each.numel() for each in run.structure.model.parameters())
    assert memory is not None
    assert memory.weights == pytest.approx(4 * count, rel=0.01)
    assert (memory.gradients, memory.optimizer, memory.reference) == (
        4 * count,
        pytest.approx(8 * count, rel=1e-3),
        memory.weights,
    )
    assert memory.accumulates
    batches, rows = run.batches, estimate.rows
    assert isinstance(batches, DatasetSource)
    parts = [batches.order.batch(0)[start : start + 3] for start in range(0, 8, 3)]
    assert estimate.largest().tokens >= max(
        int(rows.prompt_lengths[part].sum() + (rows.lengths - rows.prompt_lengths[:, None])[part].sum()) for part in parts
    )
    steps = Steps.of(rows, batches.order, batches.total)
    assert (steps.rows, steps.tokens) == (48, int(rows.lengths.sum()))
    assert steps.scored == int(rows.scored.sum())
    assert steps.all_tokens == pytest.approx(steps.tokens * batches.total / 6, abs=1)
    mean, share = steps.all_tokens / steps.total, steps.scored / steps.tokens
    assert dict(batches.steps().lines()) == {
        "epochs": f"{batches.total / 6:.3g}, each of 6 steps on 48 items",
        "tokens": f"{steps.tokens:,} an epoch; about {steps.all_tokens:,} in all steps, {mean:,.0f} a step; {share:.0%} of them"
        " scored",
        "longest": f"a batch of {max(rows.lengths[batches.order.batch(n)].sum() for n in range(6)):,} tokens, in step"
        f" {steps.longest + 1} of the first epoch",
    }
    part = Steps.of(rows, batches.order, 2).lines()
    assert part[0][1].startswith(f"{sum(int(rows.lengths[batches.order.batch(n)].sum()) for n in range(2)):,} in all steps")
    assert "epoch" not in str(part)
    assert Steps.of(rows, batches.order, 9).all_rows == 48 + 3 * 8
    uneven = replace(steps, total=24, per_epoch=4, rows=26, last=2).lines()[0]
    assert uneven == ("epochs", "6, each of 4 steps on 26 items, the last on 2")
    (time,) = estimate.time(steps)
    assert time.value.startswith("about ")

    lora = Estimate(
        prepared_run("loss=dpo", "peft=lora", "train.microbatch_size=null", "train.microbatch_tokens=null"), accelerator
    )
    adapted = lora.memory()
    assert adapted is not None
    assert adapted.gradients < memory.gradients / 4
    assert (adapted.reference, adapted.accumulates) == (0, False)
    assert lora.flops(1e6, 1e5, once=1e6) < estimate.flops(1e6, 1e5, once=1e6)


@pytest.mark.parametrize(("words", "items"), [("train.microbatch_tokens=16384", 48), ("train.microbatch_size=1", 4)])
def test_the_pass_over_the_reference_is_estimated_by_its_own_batches(
    words: str, items: int, prepared_run: Callable[..., PreparedRun]
) -> None:
    """Four times the bounds of a micro-batch, which a batch of the run does not bound; a prompt's rows have it in common."""
    run = prepared_run("loss=dpo", "reference.cache=always", "train.batch_size=2", "train.microbatch_tokens=null", words)
    estimate = Estimate(run, make_accelerator("float32", "float32"))
    rows, memory, each = estimate.rows, estimate.memory(), estimate.activations
    assert memory is not None
    assert each is not None
    computed = rows.lengths.sum(1) - rows.prompt_lengths
    most = max(int(computed[start : start + items].sum()) for start in range(0, 48, items))
    assert memory.beforehand >= each.forward * most
    assert memory.beforehand == pytest.approx((1.6 if memory.heap else 1) * each.forward * most, rel=0.2)


def test_the_peak_is_in_the_backward_pass_or_in_the_step() -> None:
    sizes = {"libraries": 1, "weights": 10, "optimizer": 20, "reference": 5, "gradients": 10, "working": 1, "head": 2}
    one = Memory(**sizes, activations=30, accumulates=False, stepping=8)
    assert one.peak == 36 + 33
    assert Memory(**sizes, activations=30, accumulates=True, stepping=8).peak == 36 + 43
    assert Memory(**sizes, activations=3, accumulates=False, stepping=8).peak == 36 + 18
    assert Memory(**sizes, activations=3, accumulates=False, stepping=8, beforehand=90).peak == 11 + 90
    assert Memory(**sizes, activations=3, accumulates=False, stepping=8, heap=16).peak == 36 + 18 + 16
    assert one.line().startswith("about 69 B at the peak: weights 10 B, gradients 10 B, optimizer 20 B, reference 5 B, ")
    first = Memory(**sizes, activations=3, accumulates=False, stepping=8, beforehand=90)
    assert first.line().startswith(
        "about 101 B at the peak: 101 B before the first step, in the pass over the reference; 54 B in a step: weights 10 B, "
    )
    assert "log-probs beforehand" not in first.line(), "the parts of a step alone, which it would not add up with"
    assert [fact.name for fact in one.facts()][-3:] == ["activations", "logits", "libraries"]


def test_seconds_are_readable_and_follow_the_rate() -> None:
    assert [speed.readable(each) for each in (1.234, 119, 600, 7200, 400_000)] == [
        "1.2 s",
        "119.0 s",
        "10.0 min",
        "2.0 h",
        "4.6 days",
    ]
    cpu = torch.device("cpu")
    assert speed.seconds_of(1e12, 1e9, cpu) == 2 * speed.seconds_of(1e12, 2e9, cpu)
    assert speed.gemm_rate(64, 64, torch.float32, cpu) > 1e6
