"""The reference of an online run has the weights of the policy that online.reference names."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from transformers import AutoModelForCausalLM

import train
from halos.cli.compose import ConfigTree
from halos.cli.online import inner_overrides, live_config, round_config
from halos.config.bind import bind_loss
from halos.data.collate import pack
from halos.distributed.launch import make_accelerator
from halos.errors import UserError
from halos.examples import PackRow
from halos.models import tiny
from halos.online.plan import OnlinePlan
from halos.run.assemble import assemble
from halos.trainers.base import Trainer
from tests import composed

Start = Callable[..., OnlinePlan]
ADAPTERS = {"full": [], "lora": ["peft=lora", "peft.r=4"]}
TRAINING = ["train.batch_size=8", "train.steps=3", "optim.lr=1e-2", "schedule=constant", "schedule.warmup=0", "train.prove=off",
            "reference.cache=never"]  # fmt: skip
ONLINE = ["loss=online", "data=arithmetic", "online.loss=dpo", "data.train=[{path: arithmetic, split: 'train[:48]'}]",
          "data.eval=[{path: arithmetic, split: 'eval[:12]'}]"]  # fmt: skip


def plan_of(place: Path, cache: Path, *words: str) -> OnlinePlan:
    """The plan of rounds in `place`, from its model `base`."""
    command = [*ONLINE, f"model.name_or_path={place / 'base'}", *TRAINING, "online.carry_optimizer=false", *words,
               f"output_root={place}", "exp_name=online", f"cache_dir={cache}"]  # fmt: skip
    config = composed.config_of(*command)
    overrides = inner_overrides(command, config)
    inner = round_config(config, overrides, ConfigTree())
    return OnlinePlan(config, inner, overrides, bind_loss(inner.loss, []))


def build_teacher(place: Path) -> None:
    """A model with other weights than the one in `base`."""
    shutil.copytree(place / "base", place / "teacher")
    teacher, generator = AutoModelForCausalLM.from_pretrained(place / "base"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    teacher.save_pretrained(place / "teacher")


@pytest.fixture(scope="module", params=ADAPTERS)
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Start, Path]:
    """How to plan rounds, and the directory of one whose first round has been trained on pairs."""
    place = tmp_path_factory.mktemp(request.param)
    tiny.build(place / "base")
    build_teacher(place)

    def start(*words: str) -> OnlinePlan:
        return plan_of(place, cache, *ADAPTERS[request.param], *words)

    plan = start()
    for number in (0, 1):
        plan.directory_of(number).mkdir(parents=True)
        pairs = [{"prompt": f"{n} + {number}?", "chosen": f"it is {n}", "rejected": f"no {n}"} for n in range(16)]
        (plan.directory_of(number) / "feedback.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    assert train.start(plan.overrides_of(0)) == 0
    return start, plan.directory.path


def assembled(words: list[str]) -> Trainer:
    config = composed.config_of(*(word for word in words if word != "resume=auto"))
    trainer = assemble(config, [], make_accelerator(config.train.precision, config.model.dtype))
    assert trainer is not None
    return trainer


def of_reference(trainer: Trainer, rows: list[PackRow]) -> torch.Tensor:
    return trainer._refer(pack(rows)).values.clone()


def of_model(directory: Path, rows: list[PackRow]) -> torch.Tensor:
    """The log-probs of the rows' completions by transformers alone, padded as the trainer's are."""
    model, values = AutoModelForCausalLM.from_pretrained(directory), []
    for prompt, completion in rows:
        ids = torch.tensor([*prompt, *completion.ids])[None]
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        scored = torch.from_numpy(completion.scored.copy())
        values.append(logps[len(prompt) - 1 :][scored])
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)


@pytest.mark.parametrize("reference", ["start", "last", "teacher"])
def test_the_reference_of_a_round_has_the_weights_that_its_key_names(reference: str, begun: tuple[Start, Path]) -> None:
    start, run_dir = begun
    models = {"start": run_dir.parent / "base", "last": run_dir / "rounds" / "000" / "train" / "FINAL",
              "teacher": run_dir.parent / "teacher"}  # fmt: skip
    key = f"reference.name_or_path={models['teacher']}" if reference == "teacher" else f"online.reference={reference}"
    trainer = assembled(start(key).overrides_of(1))
    rows = trainer.rows([trainer.train.rows[n] for n in range(8)])
    named = of_model(models.pop(reference), rows)
    others = [of_model(directory, rows) for directory in models.values()]
    for step in range(2):
        measured = of_reference(trainer, rows).double()
        assert measured.allclose(named, atol=1e-4), "before the first step, and when the policy has moved"
        assert all((measured - other).abs().max() > 1e-2 for other in others)
        totals = trainer.step(trainer.order.batch(step))
        loss = totals["loss"][0] / totals["loss"][1]
        if step == 0:
            assert (abs(loss - math.log(2)) < 1e-5) == (reference == "last"), "the policy is its own reference"
    shutil.rmtree(trainer.run.directory.path, ignore_errors=True)


def test_the_first_round_has_the_first_policy_as_its_reference(begun: tuple[Start, Path]) -> None:
    start, run_dir = begun
    words = start("online.reference=last").overrides_of(0)
    trainer = assembled([word for word in words if not word.startswith("run_dir=")] + [f"run_dir={run_dir.parent / 'again'}"])
    rows = trainer.rows([trainer.train.rows[n] for n in range(8)])
    trainer.step(trainer.order.batch(0))
    assert of_reference(trainer, rows).double().allclose(of_model(run_dir.parent / "base", rows), atol=1e-4)


@pytest.mark.parametrize(("adapter", "is_named"), [("full", False), ("lora", False), ("lora", True)])
def test_the_reference_of_a_live_loop_is_the_first_policy_or_a_named_one_whatever_was_learned(
    adapter: str, is_named: bool, cache: Path, tmp_path: Path
) -> None:
    tiny.build(tmp_path / "base")
    build_teacher(tmp_path)
    command = [*SMALL, *ONLINE, *ADAPTERS[adapter], "online.loss=grpo", "online.overrides=['loss.beta=0.1']", "online.steps=3",
               "online.samples_per_prompt=4", "online.sampler.max_new_tokens=8", "train.batch_size=8", "optim.lr=1e-2",
               "online.scorer.functions=[{function: length, target: 3}]", "schedule.warmup=0", "train.prove=off", "data.eval=[]",
               *([f"reference.name_or_path={tmp_path / 'teacher'}"] if is_named else []),
               f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=live"]  # fmt: skip
    config = live_config(composed.config_of(*command), command, ConfigTree())
    trainer = assemble(config, [], make_accelerator(config.train.precision, config.model.dtype))
    assert trainer is not None
    for step in range(3):
        indices = trainer.order.batch(step)
        rows = trainer.rows([trainer.train.rows[int(n)] for n in indices])
        named = of_model(tmp_path / ("teacher" if is_named else "base"), rows)
        assert of_reference(trainer, rows).double().allclose(named, atol=1e-4)
        totals = trainer.step(indices)
        assert (totals["kl"][0] > 1e-4) == (step > 0 or is_named), "from the second batch on the policy is another than the first"


def test_a_reference_that_nothing_reads_is_refused(cache: Path, tmp_path: Path) -> None:
    loop, without = ["online.steps=2"], "online.overrides=[loss.beta=0]"
    for words, said in (
        (["online.loss=simpo", "online.reference=last"], "online.reference=last has no effect: online.loss=simpo with these"),
        (["online.loss=grpo", without, "online.reference=start"], "online.loss=grpo with these keys reads no reference"),
        ([*loop, "online.loss=simpo", "online.reference=start"], "online.reference=start has no effect: online.loss=simpo"),
        (["online.loss=dpo", "online.reference=start", "reference.name_or_path=tiny"], "are two references: leave out one"),
        ([*loop, "online.reference=last"], "it has not moved when it begins to learn, so that the KL is 0: leave it out"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            train.start([*SMALL, *ONLINE, *words, f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=no"])
