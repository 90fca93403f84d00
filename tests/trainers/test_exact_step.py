"""One step is the exact mean over the global batch, however it is split into micro-batches."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from halos.config.bind import LossSpec
from halos.hooks.loss_state import LossState
from halos.metrics import Window
from halos.trainers.base import Trainer
from halos.types import Loss, Pair
from tests.losses import cases

LOSSES = cases.names(on_rollouts=False)
LORA = [name for name in LOSSES if name not in ("sft", "csft", "dft")]  # without a reference an adapter is weights like others
EVERY = [(loss, peft) for peft, losses in (("none", LOSSES), ("lora", LORA)) for loss in losses]
BATCH = np.arange(11)  # no multiple of any micro-batch below


def step(trainer: Trainer, indices: np.ndarray) -> tuple[float, Tensor]:
    """Loss and gradient of one step; the parameters stay as they are."""
    seen: list[Tensor] = []

    def look() -> None:
        trained = [p for p in trainer.run.module.parameters() if p.requires_grad]
        seen.append(torch.cat([p.grad.flatten().clone() for p in trained if p.grad is not None]))

    trainer.run.optimizer.step = look  # type: ignore[method-assign]
    window = Window()
    window.add(trainer.step(indices))
    return window.means()["loss"], seen[0]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("loss", "peft"), [pytest.param(*each, marks=[pytest.mark.slow] if each[0] in cases.LIKE_DPO else []) for each in EVERY]
)
def test_microbatches_of_any_size_give_the_same_step(loss: str, peft: str, trainer: Callable[..., Trainer]) -> None:
    made = trainer(f"loss={loss}", f"peft={peft}", "train.max_grad_norm=null", "train.batch_size=11")
    _unsettle(made)
    results = [step_in(made, size) for size in (11, 4, 1)]
    made.shares_prompts = False
    results.append(step_in(made, 11))
    made.shares_prompts, made.run.microbatch_tokens = True, 90
    agree([step_in(made, None), *results])


def step_in(made: Trainer, size: int | None) -> tuple[float, Tensor]:
    """The first step, `size` items at a time."""
    made.settings.microbatch_size, made.run.step = size, 0
    if isinstance(state := made.run.hooks.get("loss_state"), LossState):
        assert made.loss.start is not None
        state.values = dict(made.loss.start)
    return step(made, BATCH)


def agree(results: list[tuple[float, Tensor]]) -> None:
    (value, gradient), *others = results
    assert gradient.norm() > 0
    for other_value, other_gradient in others:
        assert other_value == pytest.approx(value, rel=1e-6, abs=1e-6)
        assert relative(other_gradient, gradient) < 5e-6


def _unsettle(made: Trainer) -> None:
    """Away from policy == reference, where many losses have no curvature and z0 is clamped to 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.run.module.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def test_z0_is_the_mean_over_the_global_batch_and_not_over_a_microbatch(trainer: Callable[..., Trainer]) -> None:
    whole, cut = (
        trainer("loss=kto", "train.batch_size=11", f"train.microbatch_size={size}", f"exp_name=z{size}") for size in (11, 2)
    )
    for made in (whole, cut):
        _unsettle(made)
    kl = [made.step(BATCH)["kl"] for made in (whole, cut)]
    assert kl[0][0] / kl[0][1] > 0.01
    assert kl[0][0] / kl[0][1] == pytest.approx(kl[1][0] / kl[1][1], rel=1e-5)


def test_each_term_of_a_sum_has_its_own_denominator_over_the_global_batch(trainer: Callable[..., Trainer]) -> None:
    """ORPO's cross-entropy is a mean over the chosen completions' tokens, its odds ratio one over pairs."""
    made = trainer("loss=orpo", "loss.weight=0.5", "train.batch_size=11", "train.microbatch_size=4", "train.max_grad_norm=null")
    items = [made.train.rows[int(row)] for row in BATCH]
    pair = Pair.of(made._output(items), items)
    p, q = ((side.values.sum(1) / side.mask.sum(1)).exp() for side in (pair.chosen, pair.rejected))
    odds = 0.5 * (1 + (1 - p) / p * q / (1 - q)).log().mean()
    nll = -pair.chosen.values.sum() / sum(int(item.completions[0].scored.sum()) for item in items)
    trained = [parameter for parameter in made.run.module.parameters() if parameter.requires_grad]
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(odds + nll, trained)])
    agree([((odds + nll).item(), gradient), step(made, BATCH)])
    made.run.step = 0
    window = Window()
    window.add(made.step(BATCH))
    assert window.means()["loss/nll"] == pytest.approx(nll.item(), rel=1e-6)
    assert window.means()["loss/odds"] == pytest.approx(odds.item(), rel=1e-5)


def test_statistics_over_the_losss_own_inputs_cost_a_pass_only_with_several_microbatches(trainer: Callable[..., Trainer]) -> None:
    """A loss of the kind of AOT or BCO: its statistics read the pairs themselves."""

    def statistics(policy: Pair) -> Tensor:
        return policy.chosen.sum - policy.rejected.sum

    def centred(policy: Pair, statistics: Tensor) -> Loss:
        return Loss((policy.chosen.sum - policy.rejected.sum - statistics.mean()) ** 2, {})

    results, passes = [], []
    for size in (11, 4):
        made = trainer("loss=simpo", "train.batch_size=11", f"train.microbatch_size={size}", "train.max_grad_norm=null",
                       f"exp_name=s{size}")  # fmt: skip
        made.loss = LossSpec(
            name="centred", function=centred, inputs=Pair, needs_reference=False, statistics=statistics,
            statistics_inputs=Pair, examples=None, example_type=None, settings={},
        )  # fmt: skip
        calls: list[int] = []
        made.run.module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        results.append(step(made, BATCH))
        passes.append(len(calls))
    assert passes == [1, 6]  # one micro-batch: one forward; three: each twice
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert relative(results[0][1], results[1][1]) < 5e-6


def test_a_reward_is_exactly_zero_before_the_first_step(trainer: Callable[..., Trainer]) -> None:
    for peft in ("none", "lora"):
        made = trainer("loss=dpo", f"peft={peft}", "reference.cache=never", f"exp_name={peft}")
        totals = made.step(BATCH)
        assert totals["rewards/chosen"][0] == totals["rewards/rejected"][0] == 0.0
        assert totals["loss"][0] / totals["loss"][1] == pytest.approx(np.log(2), abs=1e-7)


def test_lora_loads_no_second_model_as_its_reference(trainer: Callable[..., Trainer]) -> None:
    assert trainer("loss=dpo", "peft=lora").reference is None


def test_dropout_is_a_function_of_seed_step_and_position(trainer: Callable[..., Trainer]) -> None:
    made = [trainer("loss=sft", "peft=lora", "peft.lora_dropout=0.5", f"seed={seed}", f"exp_name=d{n}") for n, seed in
            enumerate((0, 0, 1))]  # fmt: skip
    for one in made:
        _unsettle(one)
    torch.manual_seed(123)
    first = step(made[0], BATCH)[1]
    torch.manual_seed(456)
    assert torch.equal(first, step(made[1], BATCH)[1])
    assert not torch.equal(first, step(made[2], BATCH)[1])
    assert made[0].run.step == 1
    assert not torch.equal(first, step(made[0], BATCH)[1]), "the second step drops what the first did"
    made[0].run.step = 0
    assert torch.equal(first, step(made[0], BATCH)[1])


def test_evaluation_does_not_depend_on_the_microbatch_and_changes_nothing(trainer: Callable[..., Trainer]) -> None:
    rows = []
    for size in (12, 5):
        made = trainer("loss=kto", "train.batch_size=12", f"train.microbatch_size={size}", f"exp_name=e{size}")
        _unsettle(made)
        before = torch.cat([p.flatten().clone() for p in made.run.module.parameters()])
        made.evaluate()
        rows.append(made.run.last_eval)
        assert torch.equal(before, torch.cat([p.flatten() for p in made.run.module.parameters()]))
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-6)
    assert rows[0]["rewards/margins"] == pytest.approx(rows[1]["rewards/margins"], rel=1e-4)
