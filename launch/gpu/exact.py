"""Exactness: the product's step beside the naive one of transformers, on the card.

Float32: both sum the same terms in other orders. A rounding is 6e-8 of a term; a gradient has passed some thirty products one
after the other, whose errors add like random ones, so that two right steps differ by 3e-7 to 2e-6 in relative L2. The bounds,
1e-6 for the loss and 5e-6 for the gradient, leave a factor of about three; products in TF32, which round each factor to 5e-4,
are at 1e-3. A loss on sums of log-probs takes beta times their differences, and each sum is rounded by 6e-8 of itself: with four
sums of S nats and n independent pairs that is 6e-8 beta 4 S / sqrt(n), the bound of such a loss where it is above 1e-6.
Bfloat16: the distance of each gradient from that in float64, of the same weights.
"""

import math
from typing import Any

import hydra
import numpy as np
import torch
from torch import Tensor

from gpu import models, rows
from gpu.naive import BETA, Naive, divergence, gradient_of, step
from gpu.place import Place, Result
from halos.config import validate
from halos.distributed.launch import make_accelerator
from halos.repository import CONFIG
from halos.run.assemble import assemble
from halos.trainers.base import Trainer

LOSS, GRADIENT = 1e-6, 5e-6  # bounds in float32, relative
RATIO, BATCHES = 1.1, 20  # bound in bfloat16, and the batches over which distances are added up
BATCH = 8
SEEDS = 16  # of the noise, of which the first is taken that shows all of a loss
NOISE = 0.02  # added to the trained weights: where policy and reference are equal, many losses have no curvature
APART = ["peft=lora", "train.share_prompts=false", "train.microbatch_tokens=500"]
CASES: dict[str, tuple[str, list[str]]] = {
    "sft full": ("sft", []),
    "dpo full": ("dpo", []),
    "dpo LoRA": ("dpo", ["peft=lora"]),
    "dpo LoRA in small micro-batches, prompts apart": ("dpo", APART),
    "kto LoRA": ("kto", ["peft=lora"]),
    "reward full": ("reward", []),
}
HALF_CASES = ("sft full", "dpo full", "dpo LoRA")


class Case:
    """A trainer whose weights are moved away from where they start, and a copy of the model that it started from."""

    def __init__(self, trainer: Trainer, loss: str) -> None:
        self.trainer, self.loss, self.start = trainer, loss, Naive(trainer.run.model).model
        for seed in range(SEEDS):
            self._move(seed)
            if loss != "kto" or divergence(*self._copies(), *self._rows(np.arange(BATCH))) > 0:
                return
        raise RuntimeError(f"no estimate of the KL is above 0 with {SEEDS} seeds, where it would count in the loss")

    def _move(self, seed: int) -> None:
        generator, starts = torch.Generator().manual_seed(seed), dict(self.start.named_parameters())
        with torch.no_grad():
            for name, parameter in self.trainer.run.model.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                    parameter.copy_(starts[name] + NOISE * noise)

    def _copies(self, **how: Any) -> tuple[Naive, Naive]:
        """Policy and reference, to be computed as `how` says."""
        return Naive(self.trainer.run.model, **how), Naive(self.start, **how)

    def _rows(self, batch: np.ndarray) -> tuple[list[Any], list[Any]]:
        """The items of a batch, and for KTO those whose completions do not answer their prompts."""
        train = self.trainer.train
        partners = [] if train.mismatched_partners is None else [train.rows[int(row)] for row in train.mismatched_partners[batch]]
        return [train.rows[int(row)] for row in batch], partners

    def naive(self, batch: np.ndarray, **how: Any) -> tuple[float, Tensor]:
        """The loss and gradient of a batch by transformers alone."""
        return step(self.loss, *self._copies(**how), *self._rows(batch))

    def rounding(self, batch: np.ndarray) -> float:
        """By how much the rounding of sums of log-probs may move the loss; 0 if it takes none."""
        if self.loss not in ("dpo", "kto"):
            return 0.0
        both = [(item.prompt, completion) for item in self._rows(batch)[0] for completion in item.completions]
        each = sum(Naive(model).size(both) for model in (self.trainer.run.model, self.start))
        # two of each: of a pair, or of a completion and the mismatched one
        return 2.0**-24 * BETA * 2 * each / math.sqrt(len(batch))

    def ours(self, batch: np.ndarray) -> tuple[float, Tensor]:
        """The loss and gradient of the trainer's own step; the weights stay as they are."""
        seen: list[Tensor] = []
        run = self.trainer.run
        run.optimizer.step = lambda *_, **__: seen.append(gradient_of(run.model))  # type: ignore[method-assign]
        run.step = 0
        total, count = self.trainer.step(batch)["loss"]
        return total / count, seen[0]


def _distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def assembled(case: str, place: Place, name: str, *, precision: str) -> Case:
    loss, words = CASES[case]
    made = rows.make("dpo-full", name, place, steps=BATCHES, batch_size=BATCH)
    typed = [
        f"loss={loss}", *words, f"model.name_or_path={place.model(name)}", f"train.precision={precision}",
        f"data.train=['{made.path}']", "data.eval=[]", "train.max_grad_norm=null", f"train.batch_size={BATCH}",
        f"train.max_length={rows.LONGEST}", "train.steps=1000", "checkpoint.every=null", "exp_name=exact",
        "reference.cache=never",  # steps are taken without a run around them
        f"run_dir={place.run(f'{name}-{list(CASES).index(case)}')}",
    ]  # fmt: skip
    with hydra.initialize_config_dir(str(CONFIG), version_base="1.3"):
        config = validate.check(hydra.compose("config", typed), typed)
    trainer = assemble(config, [], make_accelerator(config.train.precision, config.model.dtype))
    assert trainer is not None
    return Case(trainer, loss)


def float32(name: str, place: Place) -> Result:
    models.build("exact", place, place.model(name))
    found = {case: errors(assembled(case, place, name, precision="float32"), np.arange(BATCH)) for case in CASES}
    shares = {case: each["loss"] / each["permitted"] for case, each in found.items()}
    worst = max(found, key=lambda case: found[case]["gradient"])
    good = max(shares.values()) <= 1 and found[worst]["gradient"] <= GRADIENT
    figure = (
        f"worst of {len(found)}: gradient {found[worst]['gradient']:.1e} ({worst}), loss {max(shares.values()):.2f} of its bound"
    )
    return Result.of(good, figure, cases=found, tf32=torch.get_float32_matmul_precision() != "highest")


def errors(made: Case, batch: np.ndarray) -> dict[str, float]:
    """How far a step in float32 is from the naive one, the permitted error of its loss, and how far both are from float64."""
    loss, gradient = made.ours(batch)
    naive_loss, naive_gradient = made.naive(batch)
    exact_loss, exact_gradient = made.naive(batch, dtype=torch.float64)
    return {
        "loss": abs(loss - naive_loss), "permitted": max(LOSS * max(1.0, abs(naive_loss)), made.rounding(batch)),
        "gradient": _distance(gradient, naive_gradient), "loss_from_float64": abs(loss - exact_loss),
        "ours_from_float64": _distance(gradient, exact_gradient), "naive_from_float64": _distance(naive_gradient, exact_gradient),
    }  # fmt: skip


def bfloat16(name: str, place: Place) -> Result:
    models.build("exact", place, place.model(name))
    found: dict[str, dict[str, float]] = {}
    for case in HALF_CASES if place.cuda else HALF_CASES[::2]:
        made = assembled(case, place, name, precision="bfloat16")
        total = {"ours": 0.0, "naive": 0.0, "loss_ours": 0.0, "loss_naive": 0.0}
        for number in range(BATCHES if place.cuda else 1):
            batch = np.arange(number * BATCH, (number + 1) * BATCH)
            exact = made.naive(batch, dtype=torch.float64)
            steps = {"ours": made.ours(batch), "naive": made.naive(batch, half=True, attention="sdpa")}
            for which, (loss, gradient) in steps.items():
                total[which] += _distance(gradient, exact[1])
                total[f"loss_{which}"] += abs(loss - exact[0])
        found[case] = total | {"ratio": total["ours"] / total["naive"]}
    worst = max(found, key=lambda case: found[case]["ratio"])
    figure = ", ".join(f"{case} {each['ratio']:.2f}" for case, each in found.items())
    return Result.of(found[worst]["ratio"] <= RATIO, f"ratio of gradients' distances: {figure}", cases=found)
