"""DDP, real FSDP2 and DeepSpeed on gloo give the step of one process: the same gradients, then the same losses."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import compose
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from halos.models.adapter import attach
from halos.models.locate import locate
from tests import processes
from tests.launch import spread
from tests.losses import cases
from tests.mixtures import EXPERTS, build

ROOT = Path(__file__).resolve().parents[2]
# so much weight decay that it is seen what is decayed and what is not
# 13 rows in batches of 5, two at a time: a last batch of 3, so that ranks have one row, or none, or one class of KTO's
DATA = ("model=tiny data=arithmetic train.batch_size=5 train.microbatch_size=2 train.eval_every=null checkpoint.every=null "
        "optim.lr=1e-3 optim.weight_decay=3 data.train=[{path:arithmetic,split:'train[:13]'}] "
        "data.eval=[{path:arithmetic,split:'eval[:7]'}]")  # fmt: skip
LOSSES = ["sft", "dpo", "kto", "reward"]
LONG = 10  # steps: in 20 the rounding of some processors grows beyond what is allowed of the loss
EVERY = [f"loss={loss} peft={peft}" for loss in LOSSES for peft in ("none", "lora")]
ON_ROLLOUTS = [name for name in cases.names(on_rollouts=True) if name != "max_rl"]  # whose rewards are from 0 up: DATA has -1
ALL = sorted([*cases.names(on_rollouts=False), *ON_ROLLOUTS])
FAST = ("fsdp2", "zero3")  # which take turns, so that each of PATHS is in one of them
# each of which the trainer computes in its own way: means over items and over tokens, statistics of other rows, groups, values,
# and advantages over the global batch; the other losses are other functions of the same numbers
PATHS = ["dpo", "sft", "kto", "reward", "grpo", "dapo", "ppo", "reinforce_plus_plus"]


def train(output: Path, cache: Path, cells: list[str], *, steps: int, world: int, how: str) -> list[dict[str, torch.Tensor]]:
    """Every cell's first gradients and its losses."""
    spread.skip_unless_installed(how)
    output.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    words = [f"{cell} {DATA} cache_dir={cache}" for cell in cells]
    script = str(ROOT / "tests" / "launch" / "worker.py")
    done = processes.run(
        [sys.executable, *spread.launcher(how, world), script, str(output), str(steps), *words],
        capture_output=True, text=True, check=False, env=environment | spread.settings(how, output),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-40_000:]
    assert done.stdout.splitlines() == [spread.NAMES[how]] * len(cells)
    return [load_file(output / f"{number}.safetensors") for number in range(len(cells))]


def compare(alone: list[dict[str, torch.Tensor]], together: list[dict[str, torch.Tensor]], cells: list[str]) -> None:
    for one, many, cell in zip(alone, together, cells, strict=True):
        assert one.keys() == many.keys(), cell
        losses, others = one.pop("losses"), many.pop("losses")
        mine, theirs = (torch.cat([table[name].flatten().double() for name in sorted(one)]) for table in (one, many))
        assert mine.norm() > 0, cell
        assert ((mine - theirs).norm() / mine.norm()).item() < 5e-6, cell
        # a policy gradient's loss is a mean of advantages, of both signs and of size one, that nearly cancel
        least = 1e-5 if any(f"loss={name} " in f"{cell} " for name in ON_ROLLOUTS) else 1e-6
        torch.testing.assert_close(others, losses, rtol=1e-5, atol=least, msg=lambda text, cell=cell: f"{cell}: {text}")


def turn(how: str) -> list[str]:
    """A third of PATHS under ZeRO-3, whose steps take longest, and the others under FSDP2, with an adapter and without in turn;
    and under ZeRO-3 KTO's pass over other rows, and a reference that is the base itself."""
    number = FAST.index(how) if how in FAST else 0
    cells = [f"loss={name} peft={'lora' if k % 2 else 'none'}" for k, name in enumerate(PATHS) if (k % 3 == 2) == number]
    cells += [f"loss={'kto' if number else 'dpo'} peft=none humanline=on"]  # its reference moves
    return list(dict.fromkeys([*cells, *(["loss=kto peft=none", "loss=dpo peft=lora"] if how == "zero3" else [])]))


def trained_adapter(place: Path, cache: Path) -> Path:
    """One that moves what the tiny model says, so that a reference without it would be seen."""
    base, settings = locate("tiny", None, cache), asdict(compose(cache, place, "loss=dpo", "peft=lora").peft)
    adapted = attach(AutoModelForCausalLM.from_pretrained(base), settings, base=str(base), reward=None, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(str(place))
    return place


@pytest.fixture(scope="module")
def cells_of_all(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Cells that every strategy trains, with what one process computes of them."""
    place = tmp_path_factory.mktemp("models")
    mixture = build("Mixtral", place / "mixtral")  # of which a rank's rows do not reach every expert
    biased = build("DeepseekV3", place / "deepseek")  # whose routers have a buffer that training left in the files
    cells = [f"loss=dpo peft=lora peft.init_from={trained_adapter(place / 'adapter', cache)}",
             f"loss=dpo peft=lora {EXPERTS} model.name_or_path={mixture} train.router_aux_loss=0.5",
             f"loss=sft peft=none model.name_or_path={biased}"]  # fmt: skip
    return dict(zip(cells, train(place / "one", cache, cells, steps=2, world=1, how="alone"), strict=True))


@pytest.mark.parametrize("how", [*FAST, *(pytest.param(how, marks=pytest.mark.slow) for how in ("ddp", "zero2"))])
def test_a_step_of_two_ranks_equals_that_of_one(
    how: str, cells_of_all: dict[str, dict[str, torch.Tensor]], tmp_path: Path, cache: Path
) -> None:
    spread.skip_unless_installed(how)
    own = turn(how)
    alone = [*train(tmp_path / "one", cache, own, steps=2, world=1, how="alone"), *map(dict, cells_of_all.values())]
    cells = [*own, *cells_of_all]
    compare(alone, train(tmp_path / "two", cache, cells, steps=2, world=2, how=how), cells)  # and evaluates what two steps made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> list[dict[str, torch.Tensor]]:
    return train(tmp_path_factory.mktemp("alone") / "one", cache, EVERY, steps=LONG, world=1, how="alone")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2", "zero1", "zero3"])
def test_the_rest_of_the_family_on_two_processes(how: str, tmp_path: Path, cache: Path) -> None:
    spread.skip_unless_installed(how)
    # targets of 5 nats, sppo's default, make gradients of norm 1200 here, whose clipped steps multiply rounding; so does rloo's
    # ratio of a whole completion, above 100 after a step
    milder = {"sppo": "loss.beta=1", "rloo": "loss.dual_clip=3"}
    cells = [f"loss={name} {milder.get(name, '')}".strip() for name in ALL if name not in LOSSES]
    cells += ["loss=grpo loss.beta=0.1 peft=lora", "loss=ppo loss.kl_target=0.1 peft=lora"]
    alone = train(tmp_path / "one", cache, cells, steps=3, world=1, how="alone")
    compare(alone, train(tmp_path / "two", cache, cells, steps=3, world=2, how=how), cells)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize(
    "precision", ["model.dtype=bfloat16 peft=lora", "train.precision=bfloat16 train.activation_checkpointing=true"]
)
def test_a_sharded_step_in_bfloat16_equals_the_replicated_one_within_rounding(
    precision: str, how: str, tmp_path: Path, cache: Path
) -> None:
    spread.skip_unless_installed(how)
    cells = [f"loss=dpo {precision}", f"loss=reward {precision}"]
    ddp, sharded = (train(tmp_path / name, cache, cells, steps=3, world=2, how=name) for name in ("ddp", how))
    for one, other, cell in zip(ddp, sharded, cells, strict=True):
        torch.testing.assert_close(
            other["losses"], one["losses"], rtol=2e-2, atol=2e-3, msg=lambda text, cell=cell: f"{cell}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("how", ["ddp", "fsdp2", "zero2", "zero3"])
def test_every_loss_on_every_strategy(
    world: int, how: str, alone: list[dict[str, torch.Tensor]], tmp_path: Path, cache: Path
) -> None:
    if world == 1 and how == "ddp":
        pytest.skip("one process is what the others are compared with")
    together = train(tmp_path / "many", cache, EVERY, steps=LONG, world=world, how=how)
    compare([dict(table) for table in alone], together, EVERY)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", "zero3"])
def test_no_rank_holds_more_than_its_shard_of_a_model_while_it_is_saved(how: str, tmp_path: Path) -> None:
    """Four processes; by the peak of their memory. Gathered, the first holds all of it."""
    spread.skip_unless_installed(how)
    output, world = tmp_path / "memory", 4
    output.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MALLOC_TRIM_THRESHOLD_": "0"}
    script = str(ROOT / "tests" / "launch" / "shard_memory.py")
    done = processes.run(
        [sys.executable, *spread.launcher(how, world), script, str(output)], capture_output=True, text=True, check=False,
        env=environment | spread.settings(how, output),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-10_000:]
    facts = [json.loads((output / f"{rank}.json").read_text()) for rank in range(world)]
    part, largest = facts[0]["whole"] / world, facts[0]["largest"]
    print(facts)
    assert facts[0]["gathered"] > 0.9 * facts[0]["whole"]
    for each in facts:
        assert each["sharded"] < part + largest + 8 * 2**20, facts
