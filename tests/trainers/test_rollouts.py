"""A step on rollouts: advantages of whole groups, however the batch is split, and old log-probs of the policy that sampled."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoTokenizer

from halos.config import arithmetic_version
from halos.config.arithmetic_version import SIBLINGS_TOGETHER
from halos.config.schema import Config
from halos.data import arithmetic
from halos.data.order import GroupOrder
from halos.data.tokenize import vocabulary_of
from halos.distributed.launch import make_accelerator
from halos.errors import UserError
from halos.models.locate import locate
from halos.run.prepare import prepare
from halos.trainers.base import Trainer
from tests.losses import cases

from .test_exact_step import _unsettle, agree, relative, step_in

LOSSES = cases.marked(cases.names(on_rollouts=True))


@pytest.fixture
def scored(tmp_path: Path) -> str:
    """Four prompts with 4, 4, 2 and 1 answers of different lengths and rewards."""
    rows = []
    problems = list(zip(arithmetic.rows("train"), (4, 4, 2, 1), strict=False))
    for number, (row, count) in enumerate(problems):
        for sample in range(count):
            text = (row["chosen"] if sample % 2 else row["rejected"])[0]["content"] + " so" * (sample + number)
            rows.append({"type": "scalar_feedback", "prompt": row["prompt"], "output": text, "reward": (sample * 7 + number) % 5})
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train=['{path}']"


@pytest.mark.parametrize("loss", LOSSES)
def test_microbatches_of_any_size_give_the_same_step(loss: str, scored: str, trainer: Callable[..., Trainer]) -> None:
    made = trainer(f"loss={loss}", scored, "data.eval=[]", "train.max_grad_norm=null", "train.batch_size=11")
    made.prepare()
    _unsettle(made)
    agree([step_in(made, size) for size in (11, 4, 1)])


def test_an_evaluation_depends_neither_on_the_order_of_rows_nor_on_the_size_of_a_batch(
    scored: str, tmp_path: Path, trainer: Callable[..., Trainer]
) -> None:
    rows = (tmp_path / "scored.jsonl").read_text().splitlines()
    (tmp_path / "mixed.jsonl").write_text("".join(f"{rows[n]}\n" for n in (7, 2, 9, 0, 5, 10, 3, 8, 1, 6, 4)))
    found = []
    for name, size in (("scored", 4), ("mixed", 4), ("scored", 5), ("mixed", 11)):
        made = trainer("loss=dapo", scored, f"data.eval=['{tmp_path}/{name}.jsonl']", f"train.batch_size={size}",
                       "train.microbatch_size=2", f"exp_name={name}{size}")  # fmt: skip
        made.prepare()
        _unsettle(made)
        made.evaluate()
        found.append({key: made.run.last_eval[key] for key in ("loss", "reward", "groups/all_equal")})
    assert found[0]["loss"] != 0
    for each in found[1:]:
        assert each["loss"] == pytest.approx(found[0]["loss"], rel=1e-4)
        assert each["groups/all_equal"] == pytest.approx(found[0]["groups/all_equal"])
        assert each["reward"] == pytest.approx(found[0]["reward"])


def test_groups_dealt_to_ranks_give_the_step_of_one(
    scored: str, trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(
        "loss=grpo", scored, "data.eval=[]", "train.max_grad_norm=null", "train.batch_size=11", "train.microbatch_size=3"
    )
    made.prepare()
    _unsettle(made)
    monkeypatch.setattr(made.run, "step", 1)  # no first pass: the ratio is not 1
    batch, gradients = np.random.default_rng(0).permutation(11), list[Tensor]()
    for world, together in ((1, False), (1, True), (2, False), (2, True), (3, True)):
        made.deals_together, dealt = together, list[list[int]]()
        monkeypatch.setattr(Accelerator, "num_processes", world)
        for rank in range(world):
            monkeypatch.setattr(Accelerator, "process_index", rank)
            microbatches = made._microbatches(made.train, batch)
            dealt.append([int(batch[place]) for each in microbatches if each.weight for place in each.positions])
            made._backward(microbatches, batch)
        gradients.append(torch.cat([p.grad.flatten() / world for p in made.run.module.parameters() if p.grad is not None]))
        made.run.module.zero_grad()
        assert sorted(row for own in dealt for row in own) == list(range(11))
        if world == 2:
            one, other = ({int(group) for group in made.train.rows.groups[own]} for own in dealt)
            assert len(one & other) == (1 if together else 3), "prompts that both ranks compute"
    for gradient in gradients[1:]:
        assert relative(gradient, gradients[0]) < 5e-6


def test_a_run_of_an_earlier_version_deals_as_it_did(trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    assert trainer("loss=dpo").bounds.together
    monkeypatch.setattr(arithmetic_version, "VERSION", SIBLINGS_TOGETHER - 1)
    assert not trainer("loss=dpo", "exp_name=before").bounds.together


def test_old_log_probs_are_those_of_the_start_where_the_sampler_kept_none(scored: str, trainer: Callable[..., Trainer]) -> None:
    made = trainer("loss=grpo", scored, "data.eval=[]", "train.batch_size=11")
    made.prepare()
    assert made.step(np.arange(11))["approx_kl"][0] == 0.0
    assert made.step(np.arange(11))["approx_kl"][0] > 0.0, "the policy has moved, what it was has not"


def test_a_correction_of_rows_without_their_samplers_log_probs_is_said_to_do_nothing(
    scored: str, trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer("loss=grpo", scored, "data.eval=[]", "train.correction=mask")
    made.prepare()
    rows = len(made.train.rows)
    assert f"train.correction=mask corrects nothing of {rows} of {rows} rows of data.train" in caplog.text


@pytest.fixture(scope="module")
def vocabulary(cache: Path) -> str:
    return vocabulary_of(AutoTokenizer.from_pretrained(locate("tiny", None, cache)))


@pytest.mark.parametrize(
    ("loss", "precision"),
    [*(pytest.param(*each.values, "float32", marks=each.marks) for each in LOSSES), ("gspo", "bfloat16"), ("ppo", "bfloat16")],
)
def test_on_the_first_step_no_ratio_differs_from_1_whatever_the_sampler_says(
    loss: str, precision: str, vocabulary: str, tmp_path: Path, trainer: Callable[..., Trainer]
) -> None:
    prompts = [row["prompt"] for row in islice(arithmetic.rows("train"), 2)]
    rows = [{"type": "scalar_feedback", "prompt": prompt, "output": "", "reward": float(sample), "output_ids": [30 + sample, 31],
             "logps": [-0.1, -9.0], "vocabulary": vocabulary} for prompt in prompts for sample in range(2)]  # fmt: skip
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = trainer(f"loss={loss}", f"data.train=['{tmp_path / 's.jsonl'}']", "data.eval=[]", "train.batch_size=4",
                   f"train.precision={precision}", "train.microbatch_size=2", "peft=lora", "peft.lora_dropout=0.1")  # fmt: skip
    made.prepare()
    first, second = (made.step(np.arange(4)) for _ in range(2))
    assert first["clip_fraction"][0] == first["approx_kl"][0] == 0.0
    assert second["approx_kl"][0] > 0.0
    total, count = first["mismatch/mean"]
    assert total / count > 1.0, "it is measured, and weighs the advantages"
    assert first["mismatch/max"][0] > total / count


def test_the_samplers_own_tokens_and_log_probs_are_used(vocabulary: str, tmp_path: Path, trainer: Callable[..., Trainer]) -> None:
    prompt = next(arithmetic.rows("train"))["prompt"]
    rows = [{"type": "scalar_feedback", "prompt": prompt, "output": "text that says something else", "reward": reward,
             "output_ids": [30 + reward, 31, 1], "logps": [-0.5, -0.25, -0.125], "vocabulary": name}
            for reward, name in ((0, vocabulary), (1, vocabulary), (2, "another"))]  # fmt: skip
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = trainer("loss=grpo", f"data.train=['{tmp_path / 's.jsonl'}']", "data.eval=[]", "train.batch_size=3", "exp_name=own")
    items = [made.train.rows[row] for row in range(3)]
    assert items[1].completions[0].ids.tolist() == [31, 31, 1]
    np.testing.assert_array_equal(items[1].logps, np.array([-0.5, -0.25, -0.125], np.float32))
    assert items[2].logps is None, "ids of another tokenizer mean nothing here"
    assert "1 without token ids of this tokenizer" in made.train.rows.lines()[0]
    made.prepare()
    microbatch = made._microbatches(made.train, np.arange(3))[0]
    batch = microbatch.rollouts
    np.testing.assert_array_equal(batch.sampled[0, :3], torch.tensor([-0.5, -0.25, -0.125]))
    assert batch.sampled[2, :3].isnan().all(), "what is not known is not made up"
    assert (batch.old[:2, :3] - batch.sampled[:2, :3]).abs().min() > 0.1, "old log-probs are the trainer's own"


@pytest.mark.parametrize("loss", ["grpo", "dapo", *cases.marked(["dr_grpo"]), "gspo", "rloo", "reinforce_plus_plus", "ppo"])
def test_a_masked_sample_counts_in_its_group_and_nothing_of_it_is_learned(
    loss: str, vocabulary: str, tmp_path: Path, trainer: Callable[..., Trainer]
) -> None:
    """Its tokens may be any: the step is the same. Its reward may not."""
    prompt, moved = next(arithmetic.rows("train"))["prompt"], list[torch.Tensor]()
    for number, (reward, ids) in enumerate((((5.0), [30, 31]), (5.0, [40, 41, 42]), (0.5, [30, 31]))):
        rows = [{"type": "scalar_feedback", "prompt": prompt, "output": "x", "reward": own, "output_ids": tokens,
                 "vocabulary": vocabulary, "masked": masked, "finish": "length" if masked else "stop"}
                for own, tokens, masked in ((0.0, [50, 51, 1], False), (1.0, [52, 1], False), (reward, ids, True))]  # fmt: skip
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = trainer(f"loss={loss}", f"data.train=['{path}']", "data.eval=[]", "train.batch_size=3", "train.microbatch_size=1",
                       "train.max_grad_norm=null", "optim=sgd", "optim.lr=1", "schedule=constant", "schedule.warmup=0",
                       f"exp_name={loss}{number}")  # fmt: skip
        assert made.train.rows.scored[:, 0].tolist() == [3, 2, 0]
        made.prepare()
        totals = made.step(np.arange(3))
        assert totals["reward"][0] / totals["reward"][1] == pytest.approx((1 + reward) / 3), "it is measured with the others"
        assert totals["length"] == (5.0, 2.0), "of those that are learned from"
        moved.append(torch.cat([each.detach().flatten() for each in made.run.module.parameters()]))
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-7)
    differs = (moved[0] - moved[2]).abs().max() > 1e-5
    assert differs == (loss not in ("ppo", "reinforce_plus_plus")), "where there is a baseline of the group, it is another"


def test_a_batch_of_masked_samples_alone_leaves_the_kl_coefficient_and_gives_no_metrics_of_tokens(
    vocabulary: str, tmp_path: Path, trainer: Callable[..., Trainer]
) -> None:
    prompt = next(arithmetic.rows("train"))["prompt"]
    rows = [{"type": "scalar_feedback", "prompt": prompt if n < 2 else "Two?", "output": "x", "reward": 0.5 * n,
             "output_ids": [30 + n, 31], "vocabulary": vocabulary, "masked": n < 2, "finish": "length"}
            for n in range(4)]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = trainer("loss=ppo", "loss.kl_coefficient=0.1", "loss.kl_target=6", f"data.train=['{tmp_path / 'm.jsonl'}']",
                   "data.eval=[]", "train.batch_size=2")  # fmt: skip
    made.prepare()
    losses, backward = [], made.run.strategy.backward
    made.run.strategy.backward = lambda module, loss, **more: (losses.append(loss.item()), backward(module, loss, **more))
    totals = made.step(np.arange(2))
    assert losses == [0.0], "a mean over no tokens would be no number"
    assert not {"kl", "length", "value/explained_variance"} & totals.keys()
    assert made._controller().value == 0.1


def test_sampled_ids_that_the_policy_has_no_embedding_for_are_refused_by_their_row(
    vocabulary: str, tmp_path: Path, trainer: Callable[..., Trainer]
) -> None:
    rows = [{"type": "scalar_feedback", "prompt": "One?", "output": "x", "reward": 0.5, "output_ids": [30, token],
             "vocabulary": vocabulary} for token in (31, 60_000)]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"m\.jsonl:2 has the token id 60000, and the policy knows \d+ ids"):
        trainer("loss=ppo", f"data.train=['{tmp_path / 'm.jsonl'}']", "data.eval=[]", "train.batch_size=2")


def test_old_log_probs_that_rounding_moves_beyond_the_clip_are_warned_of(
    scored: str, trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    for off, warned in ((1e-5, False), (2e-3, True)):  # GSPO's clip is 3e-4 below 1
        made = trainer("loss=gspo", scored, "data.eval=[]", "train.batch_size=11", f"exp_name=off{off}")
        made.prepare()
        cache = made.rollouts._loaded["train"]
        made.rollouts._loaded["train"] = replace(cache, old=replace(cache.old, flat=cache.old.flat + np.float32(off)))
        totals = made.step(np.arange(11))
        assert totals["old/drift"][0] / totals["old/drift"][1] == pytest.approx(off, rel=0.1)
        assert (totals["old/clip_fraction"][0] > 0, "a wider clip" in caplog.text) == (warned, warned)
        assert totals["clip_fraction"][0] == 0.0


def test_steps_without_an_advantage_are_warned_of_once(
    tmp_path: Path, trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"type": "scalar_feedback", "prompt": row["prompt"], "output": f"so {sample}", "reward": 1.0}
            for row in islice(arithmetic.rows("train"), 2) for sample in range(2)]  # fmt: skip
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = trainer("loss=grpo", f"data.train=['{tmp_path / 's.jsonl'}']", "data.eval=[]", "train.batch_size=4")
    made.prepare()
    for steps in (2, 1, 5):
        for _ in range(steps):
            assert made.step(np.arange(4))["grad_norm"][0] == 0.0
        assert caplog.text.count("no sample was better") == (steps != 2)


def test_the_value_head_may_have_a_rate_of_its_own(scored: str, trainer: Callable[..., Trainer]) -> None:
    own_rate = ["optim=sgd", "optim.lr=1e-9", "optim.lr_by_name={value_head: 0.5}", "optim.weight_decay=0", "schedule=constant"]
    made = trainer("loss=ppo", scored, "data.eval=[]", "train.batch_size=11", *own_rate, "schedule.warmup=0")
    parameters = dict(made.run.module.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    made.prepare()
    made.step(np.arange(11))
    moved = {name: (parameter.detach() - before[name]).abs().max().item() for name, parameter in parameters.items()}
    own = {name for name in moved if "value_head" in name}
    assert len(own) == 2
    assert min(moved[name] for name in own) > 1e-4
    assert max(moved[name] for name in moved.keys() - own) < 1e-7


def test_the_rollout_cache_of_the_start_is_kept_for_a_resume(scored: str, trainer: Callable[..., Trainer]) -> None:
    words = ["loss=ppo", scored, "data.eval=[]", "train.batch_size=11"]
    first = trainer(*words)
    first.prepare()
    assert first.reference is None, "all that it had to say is known"
    again = trainer(*words, f"resume={first.run.directory.path}")
    _unsettle(again)
    again.prepare()
    one, other = (made.rollouts.of(made.train) for made in (first, again))
    for name in ("old", "reference", "values"):
        np.testing.assert_array_equal(getattr(one, name).flat, getattr(other, name).flat)
    damaged = first.run.directory.path / "rollouts" / "train" / "rollouts.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    late = trainer(*words, f"resume={first.run.directory.path}")
    late.run.step = 3
    with pytest.raises(UserError, match="is damaged or missing, and cannot be computed again"):
        late.prepare()


def test_the_coefficient_of_an_adaptive_kl_moves_and_is_part_of_the_state(scored: str, trainer: Callable[..., Trainer]) -> None:
    made = trainer("loss=ppo", "loss.kl_target=1.0", "loss.kl_horizon=100", scored, "data.eval=[]", "train.batch_size=11")
    made.prepare()
    hook: Any = made.run.hooks["kl_coefficient"]
    before = hook.value
    totals = made.step(np.arange(11))
    assert totals["kl_coefficient"][0] == before
    assert hook.value == pytest.approx(before * (1 - 0.2 * 11 / 100))  # the KL is 0 at the start, far below its target
    hook.load_state_dict({"value": 0.5})
    assert hook.state_dict() == {"value": 0.5, "start": before}


def test_a_batch_holds_whole_groups() -> None:
    groups = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3])
    order = GroupOrder(groups, [1.0], 6, 0)
    assert order.batches_per_epoch == 2
    assert order.mean_size == np.mean([len(order.batch(k)) for k in range(2)])
    assert order.largest.tolist() in ([0, 1, 2], [5, 6, 7])
    for epoch in range(3):
        batches = [order.batch(epoch * 2 + k) for k in range(2)]
        assert sorted(np.concatenate(batches)) == list(range(9))
        for batch in batches:
            for group in set(groups[batch]):
                assert (groups[batch] == group).sum() == (groups == group).sum()
    with pytest.raises(UserError, match="cannot hold a whole group: one prompt has 3"):
        GroupOrder(groups, [1.0], 2, 0)
    with pytest.raises(UserError, match="would split groups of samples"):
        GroupOrder(groups, [0.5], 6, 0)


def test_groups_that_leave_batches_half_empty_are_named_with_the_largest(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    def warned(*sizes: int) -> list[str]:
        rows = [
            {"prompt": f"{group}?", "completion": f"{n}", "reward": n} for group, size in enumerate(sizes) for n in range(size)
        ]
        (path := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = configure("loss=grpo", f"data.train=[{path}]", "data.eval=[]", "train.batch_size=8", "train.steps=1")
        run = prepare(config, make_accelerator(config.train.precision, config.model.dtype), None)
        return [each.line() for check in run.batches.checks for each in check.findings if "whole groups" in each.text]

    assert warned(4, 4, 4, 4) == []
    (line,) = warned(2, 2, 8, 2)
    assert line.startswith("a step has 3.5 completions on average, and train.batch_size=8")
    assert "which has 8" in line
    assert "rows.jsonl:5" in line


def test_a_value_head_is_saved_next_to_the_policy_and_loaded_again(
    scored: str, trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    for peft in ("none", "lora"):
        made = trainer("loss=ppo", f"peft={peft}", scored, "data.eval=[]", "train.batch_size=11", "train.steps=2",
                       f"exp_name={peft}")  # fmt: skip
        made.fit()
        final = tmp_path / peft / "FINAL"
        head: Tensor = made.run.module.value_head.weight
        assert head.abs().sum() > 0
        more = [f"peft.init_from={final / 'adapter'}"] if peft == "lora" else [f"model.name_or_path={final}"]
        second = trainer("loss=ppo", f"peft={peft}", scored, "data.eval=[]", "train.batch_size=11", *more, f"exp_name={peft}2")
        assert torch.equal(second.run.module.value_head.weight, head)
        if peft == "lora":
            taken = {name: p for name, p in second.run.model.named_parameters() if "lora_B" in name}
            assert all(torch.equal(p, made.run.model.get_parameter(name)) for name, p in taken.items())
            with pytest.raises(UserError, match=r"was trained with peft.r=16, and this run has 8"):
                trainer("loss=ppo", "peft=lora", "peft.r=8", scored, "data.eval=[]", "train.batch_size=11", *more, "exp_name=x")
