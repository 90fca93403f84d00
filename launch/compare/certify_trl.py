"""Run the checks of `python -m halos.losses.certify` on the losses of TRL's trainers: a Markdown table.

    pip install torch==2.13.0 trl==1.16.0 omegaconf && PYTHONPATH=. python launch/compare/certify_trl.py

The loss methods of its trainers run (trl_replay.py). Micro-batches and ranks are averaged as transformers' Trainer does where a
loss gets no global count: the mean of each rank's micro-batch means, then of the ranks. Worked numbers, mutants and cost are ours
alone.
"""

import logging
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import trl
from certify_peers import printed, without_gradients
from tensors import Batch, Outcome
from trl_replay import trl_cpo, trl_dpo, trl_kto, trl_orpo, trl_reward

from halos.certify.case import Case, Plan, Step
from halos.certify.tabular import Table
from halos.data.collate import mismatched_row
from halos.types import Labelled, LossInput, Pair, PairScores, TokenLogps

Backward = Callable[[float], None]  # of a share of the loss
Run = Callable[[Case, np.ndarray, int], tuple[Outcome, Backward]]


@dataclass(frozen=True, eq=False)
class Theirs:
    """A trainer's loss in the place of ours."""

    name: str
    inputs: type[LossInput]
    refers: bool
    run: Run
    token_statistics: tuple[str, ...] = ()
    candidates: int = 0

    def step(self, case: Case, plan: Plan, padding: int = 0) -> Step:
        without_gradients(case)
        parts = [[part for part in rank if len(part)] for rank in plan]
        values, total, names, finite = torch.full((len(case.items),), torch.nan), 0.0, [], True
        for rank in parts:
            for part in rank:
                share = 1 / (len(rank) * len(parts))
                outcome, backward = self.run(case, part, padding)
                backward(share)
                total += outcome.loss.item() * share
                finite &= all(map(math.isfinite, outcome.metrics.values()))
                names.append(frozenset({"logged"}))
        logged = {"logged": (0.0 if finite else math.inf, 1.0)}  # what TRL logs has its own names: whether all of it is finite
        return Step(total, case.policy.gradients(), logged, names, values)


def _logps(table: Table, case: Case, part: np.ndarray, padding: int) -> TokenLogps:
    output = table.output(case.inputs.rows([case.items[n] for n in part]), padding)
    assert isinstance(output, TokenLogps)
    return output


def on_pairs(trainer: Callable[..., Outcome], **settings: Any) -> Run:
    def run(case: Case, part: np.ndarray, padding: int) -> tuple[Outcome, Backward]:
        policy, reference = (_logps(table, case, part, padding) for table in (case.policy, case.reference))
        batch = Batch(policy.values.detach().requires_grad_(), reference.values.detach(), policy.mask)
        outcome = trainer(batch, **settings)
        return outcome, lambda share: policy.values.backward(outcome.gradient * share)

    return run


def on_labels(case: Case, part: np.ndarray, padding: int) -> tuple[Outcome, Backward]:
    policy, reference = (_logps(table, case, part, padding) for table in (case.policy, case.reference))
    rows = [mismatched_row(case.items[n], case.partners[n], 4096) for n in part]
    mine, other = (table.output(rows, padding) for table in (case.policy, case.reference))
    assert isinstance(mine, TokenLogps)
    assert isinstance(other, TokenLogps)
    batch = Batch(policy.values.detach().requires_grad_(), reference.values.detach(), policy.mask)
    mismatched = Batch(mine.values.detach(), other.values.detach(), mine.mask)
    labels = [case.items[n].labels["desirable"] > 0 for n in part]
    outcome = trl_kto(batch, mismatched, labels, beta=0.1, weights=(1.0, 1.0))
    return outcome, lambda share: policy.values.backward(outcome.gradient * share)


def on_scores(case: Case, part: np.ndarray, padding: int) -> tuple[Outcome, Backward]:
    output = case.policy.output(case.inputs.rows([case.items[n] for n in part]), padding)
    assert isinstance(output, torch.Tensor)
    outcome = trl_reward(output.detach().requires_grad_(), None, None)
    return outcome, lambda share: output.backward(outcome.gradient * share)


DPO = ("sigmoid", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
       "apo_down", "discopop", "sigmoid_norm")  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "robust": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 1e-3}, "discopop": {"discopop_tau": 0.05},
}  # fmt: skip


READING = """`micro-batches` has one row in each, `accumulation` 1 + 3 + 2 rows, and the three `ranks` 3, 2 and 1, as the last
batch of an epoch may: TRL's means of means are exact where all are of equal size and a loss has one denominator, as
those that pass `micro-batches`. At the start DiscoPOP's slope, and `apo_down`'s of 0 for what is chosen, are what their
formulas have: halos declares them so. The policy gradients of TRL, whose advantages and denominators are computed outside of
their loss methods, are not in this table."""


def theirs() -> list[Theirs]:
    dpo = [Theirs(f"DPO `{kind}`", Pair, True, on_pairs(trl_dpo, loss_type=kind, beta=0.1, **SETTINGS.get(kind, {})))
           for kind in DPO]  # fmt: skip
    cpo = partial(trl_cpo, beta=0.1)
    return [
        *dpo,
        Theirs("CPO `sigmoid`, cpo_alpha 1", Pair, False, on_pairs(cpo, loss_type="sigmoid", alpha=1.0)),
        Theirs("CPO `simpo`", Pair, False, on_pairs(cpo, loss_type="simpo", gamma=0.5)),
        Theirs("CPO `hinge`", Pair, False, on_pairs(cpo, loss_type="hinge")),
        Theirs("ORPO", Pair, False, on_pairs(trl_orpo, beta=0.1)),
        Theirs("KTO `kto`", Labelled, True, on_labels),
        Theirs("Reward", PairScores, False, on_scores),
    ]


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    print(f"The checks of `python -m halos.losses.certify` on TRL {trl.__version__}, torch {torch.__version__}\n")
    notes = printed("TRL", theirs(), ("dpo", "aot", "cpo", "orpo", "kto", "bco", "reward"))
    print(f"\n{READING}\n\n" + "\n".join(notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
