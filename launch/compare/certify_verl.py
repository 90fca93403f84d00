"""Run the checks of `python -m halos.losses.certify` on verl's losses on rollouts: a Markdown table.

    PYTHONPATH=. python launch/compare/certify_verl.py  (what to install: losses_vs_verl.py)

Advantages by verl's estimators over the whole batch, then its actor's whole loss (and its critic's) on each micro-batch, with the
counts of the global batch that its engine sends along: micro-batches are added up, ranks averaged.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import verl
from certify_peers import printed, without_gradients
from tensors import Batch
from torch import Tensor
from verl.trainer.config import AlgoConfig
from verl_replay import Counts, actor, verl_advantages, verl_policy, verl_value

from halos.certify.case import Case, Plan, Step
from halos.types import Acted, LossInput, Rollouts, TokenLogps, ValuedRollouts

MODES = ("gspo", "sapo", "cispo", "gpg", "geo_mean", "clip_cov", "kl_cov", "dppo_tv", "dppo_kl")
ESTIMATORS = ("grpo_vectorized", "grpo_passk", "gdpo", "rloo", "rloo_vectorized", "opo", "gpg", "reinforce_plus_plus",
              "reinforce_plus_plus_baseline")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Theirs:
    """A policy loss with an estimator of advantages in the place of ours."""

    name: str
    mode: str = "vanilla"
    estimator: str = "grpo"
    settings: dict[str, Any] = field(default_factory=dict)  # of the actor
    of_loss: dict[str, Any] = field(default_factory=dict)
    inputs: type[LossInput] = Rollouts
    refers: bool = False
    token_statistics: tuple[str, ...] = ()
    candidates: int = 0

    def step(self, case: Case, plan: Plan, padding: int = 0) -> Step:
        without_gradients(case)
        whole, total, names, finite = self._whole(case), 0.0, [], True
        counts = Counts(int(whole.mask.sum()), len(case.items), len(plan))
        for part in (part for rank in plan for part in rank if len(part)):
            loss, logged = self._part(case, part, padding, whole, counts)
            (loss / len(plan)).backward()
            total += loss.item() / len(plan)
            finite &= all(map(math.isfinite, logged.values()))
            names.append(frozenset({"logged"}))
        logged = {"logged": (0.0 if finite else math.inf, 1.0)}  # what verl logs has its own names: whether all of it is finite
        return Step(total, case.policy.gradients(), logged, names, torch.full((len(case.items),), torch.nan))

    def _whole(self, case: Case) -> Whole:
        """Old log-probs, old values, advantages and returns of the global batch."""
        rows = self.inputs.rows(case.items)
        logps, values = _parts(case.sampler.output(rows))
        rewards = torch.tensor([next(iter(item.labels.values())) for item in case.items], dtype=case.policy.dtype)
        more: dict[str, Any] = {"config": AlgoConfig(gamma=1.0)}
        if values is not None:
            more = {"values": values, "gamma": 1.0, "lam": 0.95}
        estimates, returns = verl_advantages(self.estimator, rewards, logps.mask, [int(n) for n in case.groups], **more)
        return Whole(logps.values, logps.mask, values, case.sign * estimates * logps.mask, returns * logps.mask)

    def _part(self, case: Case, part: np.ndarray, padding: int, whole: Whole, counts: Counts) -> tuple[Tensor, dict[str, float]]:
        rows = self.inputs.rows([case.items[n] for n in part])
        logps, values = _parts(case.policy.output(rows, padding), detach=False)
        width = logps.mask.shape[1]
        old = logps.values.detach() if case.first_pass else whole.cut(whole.old, part, width)
        batch = Batch(logps.values.detach().requires_grad_(), old, logps.mask)
        reference = _parts(case.reference.output(rows, padding))[0].values if self.refers else None
        config = actor(self.mode, of_loss=self.of_loss, use_kl_loss=self.refers, **self.settings)
        found = verl_policy(batch, whole.cut(whole.advantages, part, width), config, reference=reference, counts=counts)
        loss = found.loss + (found.gradient.detach() * (logps.values - logps.values.detach())).sum()
        if values is None or whole.values is None:
            return loss, found.metrics
        known = (whole.cut(each, part, width) for each in (whole.values, whole.returns))
        critic, metrics = verl_value(values, *known, logps.mask, 0.5, counts)
        return loss + critic, {**found.metrics, **metrics}


@dataclass(frozen=True)
class Whole:
    """A global batch: (rows, time) each."""

    old: Tensor
    mask: Tensor
    values: Tensor | None
    advantages: Tensor
    returns: Tensor

    @staticmethod
    def cut(column: Tensor, part: np.ndarray, width: int) -> Tensor:
        return torch.nn.functional.pad(column[torch.from_numpy(part)], (0, width - column.shape[1]))


def _parts(output: TokenLogps | Acted | Tensor, *, detach: bool = True) -> tuple[TokenLogps, Tensor | None]:
    assert not isinstance(output, Tensor)
    logps, values = (output.logps, output.values) if isinstance(output, Acted) else (output, None)
    if not detach:
        return logps, values
    return logps.detach(), None if values is None else values.detach()


def theirs() -> list[Theirs]:
    """With verl's own defaults but for what the name says."""
    sequences, norm = {"loss_agg_mode": "seq-mean-token-mean"}, {"loss_agg_mode": "seq-mean-token-sum-norm"}
    corrected = {"rollout_correction": {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 2.0}}
    return [
        Theirs("`vanilla`"),
        Theirs("`vanilla`, seq-mean-token-mean", settings=sequences),
        Theirs("`vanilla`, seq-mean-token-sum-norm", settings=norm),
        Theirs("`vanilla`, seq-mean-token-sum-norm, loss_scale_factor 6", settings={**norm, "loss_scale_factor": 6}),
        Theirs("`vanilla`, use_kl_loss", refers=True),
        *(Theirs(f"`{mode}`", mode) for mode in MODES),
        Theirs("`dro`, dro_beta .1", "dro", of_loss={"dro_beta": 0.1}),
        Theirs("`bypass_mode`, reinforce", "bypass_mode", of_loss=corrected),
        *(Theirs(f"`vanilla`, advantages `{name}`", estimator=name) for name in ESTIMATORS),
        Theirs("`vanilla`, advantages `gae`, and the critic", estimator="gae", inputs=ValuedRollouts),
    ]  # fmt: skip


READING = """Advantages are those of verl's `grpo` unless another estimator is named. `micro-batches` has one row in each,
`accumulation` 1 + 3 + 2 rows, and the three `ranks` 3, 2 and 1. verl's engine sends the tokens and rows of the global batch
along, so that a loss that is a sum over them does not depend on the cut. `seq-mean-token-sum-norm` without loss_scale_factor
divides by the width of the tensor, `geo_mean` by the rows of the micro-batch, and `clip_cov` and `kl_cov` choose tokens by their
covariance within it; these three do not bound a ratio before the exponential. `clip_cov`
means to leave tokens without a gradient. What verl logs of a policy loss are means of
micro-batches' means, and not in this table."""


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)  # clip_cov draws the tokens that it leaves out
    print(f"The checks of `python -m halos.losses.certify` on verl {verl.__version__}, torch {torch.__version__}\n")
    ours = ("grpo", "dr_grpo", "dapo", "gspo", "sapo", "cispo", "opo", "rloo", "reinforce_plus_plus", "ppo")
    notes = printed("verl", theirs(), ours)
    print(f"\n{READING}\n\n" + "\n".join(notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
