"""The reference of a run that starts from an adapter is its initial policy, not the bare base."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import compose
from safetensors.torch import load_file
from world import World, resume, stopped

from halos.data.collate import pack
from halos.distributed.launch import make_accelerator
from halos.run.assemble import assemble
from halos.trainers.base import Trainer

KINDS = {"lora": [], "dora": ["peft.use_dora=true"], "head": ["peft.modules_to_save=[lm_head]"]}


@pytest.fixture(scope="module", params=KINDS)
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[World, list[str]]:
    """A world, and the overrides for DPO from an adapter that SFT has trained in it."""
    world = World(tmp_path_factory.mktemp("world"), cache)
    words = ["peft=lora", "peft.r=2", *KINDS[request.param]]
    adapter = world.train("sft", "loss=sft", "optim.lr=3e-2", *words) / "FINAL" / "adapter"
    return world, [*words, f"peft.init_from={adapter}", "train.eval_at_start=true", "reference.cache=never"]


def assembled(world: World, name: str, *words: str) -> Trainer:
    config = compose(world.cache, world.place / "runs", *world.words(name, *words))
    trainer = assemble(config, [], make_accelerator(config.train.precision, config.model.dtype))
    assert trainer is not None
    return trainer


def refer(trainer: Trainer) -> torch.Tensor:
    batch = pack(trainer.rows([trainer.train.rows[n] for n in range(8)]))
    return trainer._refer(batch).values.clone()


def refer_in_half(trainer: Trainer) -> torch.Tensor:
    with trainer.run.accelerator.autocast():
        return refer(trainer)


def test_the_first_loss_is_log_2_and_the_reference_never_changes(begun: tuple[World, list[str]]) -> None:
    world, words = begun
    trainer = assembled(world, "dpo", *words)
    trainer.evaluate()
    assert trainer.run.last_eval["loss"] == pytest.approx(math.log(2), abs=1e-7)
    first = refer(trainer)
    for step in range(2):
        trainer.step(trainer.order.batch(step))
    assert torch.equal(refer(trainer), first)
    batch = pack(trainer.rows([trainer.train.rows[n] for n in range(8)]))
    assert not torch.equal(trainer.run.module.eval()(batch).values, first), "the policy has moved"
    merged = assembled(world, "named", *words, f"reference.name_or_path={world.place / 'runs' / 'sft' / 'FINAL'}")
    assert first.allclose(refer(merged), atol=1e-4), "the merged model of the first run"
    base = assembled(world, "off", *words, "reference.adapter=off")
    assert (first - refer(base)).abs().max() > 0.05, "the adapter has learned something"
    base.evaluate()
    assert abs(base.run.last_eval["loss"] - math.log(2)) > 1e-3


def test_under_autocast_the_policy_computes_from_its_own_values_after_those_of_its_reference(
    begun: tuple[World, list[str]],
) -> None:
    world, words = begun
    trainer = assembled(world, "half", *words, "train.precision=bfloat16")
    rows = [trainer.train.rows[n] for n in range(8)]
    expected = refer_in_half(trainer)
    with torch.no_grad():
        for parameter in trainer.run.module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    alone = trainer._output(rows).values
    assert not torch.equal(alone, expected)
    policy, reference = trainer._forward(pack(trainer.rows(rows)), lambda output: output.values)
    assert torch.equal(policy, alone)
    assert torch.equal(reference, expected)
    policy.sum().backward()
    assert all(each.grad is not None for each in trainer.run.module.parameters() if each.requires_grad)


def test_a_resumed_run_has_the_same_reference(begun: tuple[World, list[str]]) -> None:
    world, words = begun
    whole = world.train("whole", *words)
    directory = stopped(world.train("again", *words))
    assert resume(directory) == 0
    rows = [[json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()] for each in (whole, directory)]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    mine, theirs = (load_file(each / "FINAL" / "model.safetensors") for each in (whole, directory))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize(
    "adapter",
    [
        "peft.use_dora=true",
        "peft.modules_to_save=[embed_tokens]",
        "peft.modules_to_save=[norm]",
        "peft.modules_to_save=[lm_head]",
    ],
)
def test_a_fresh_adapter_on_a_base_in_half_precision_is_its_reference_to_the_bit(
    adapter: str, trainer: Callable[..., Trainer]
) -> None:
    made = trainer("loss=dpo", "peft=lora", adapter, "model.dtype=bfloat16", "reference.cache=never")
    rows = [made.train.rows[n] for n in range(8)]
    policy, reference = made._forward(pack(made.rows(rows)), lambda output: output.values)
    assert torch.equal(policy, reference)


def test_a_head_that_is_trained_whole_has_logits_of_float32_sums(trainer: Callable[..., Trainer]) -> None:
    """Those of the base's head, which its weights still are, and not rounded to bfloat16."""
    made = trainer("loss=dpo", "peft=lora", "peft.modules_to_save=[lm_head]", "train.precision=bfloat16", "reference.cache=never")
    plain = trainer("loss=dpo", "peft=lora", "train.precision=bfloat16", "reference.cache=never", "exp_name=plain")
    policies = [each._output([each.train.rows[n] for n in range(8)]).values for each in (made, plain)]
    assert torch.equal(*policies)
