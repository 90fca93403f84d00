"""Metrics that the preference losses share, under the field's names."""

from torch import Tensor

from halos.types import Mean, Pair


def won(better: Tensor, worse: Tensor) -> Tensor:
    """1 where `better` is larger, 0 where it is smaller and 0.5 for a tie: (rows,)."""
    return (better > worse).float() + 0.5 * (better == worse).float()


def log_ratios(policy: Pair, reference: Pair) -> tuple[Tensor, Tensor]:
    """log pi / pi_ref of the chosen and of the rejected completions: (rows,) each."""
    return policy.chosen.sum - reference.chosen.sum, policy.rejected.sum - reference.rejected.sum


def pair_metrics(policy: Pair, chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Mean]:
    """Implicit rewards (rows,), and two accuracies: of the implicit reward, and of the policy's own ranking.

    They differ: where policy == reference every implicit reward is 0, so every pair is a tie and the reward accuracy is 0.5,
    while the ranking accuracy is the reference's own.
    """
    return {
        "rewards/chosen": Mean.of(chosen_rewards),
        "rewards/rejected": Mean.of(rejected_rewards),
        "rewards/margins": Mean.of(chosen_rewards - rejected_rewards),
        "rewards/accuracies": Mean.of(won(chosen_rewards, rejected_rewards)),
        "logps/chosen": Mean.of(policy.chosen.sum),
        "logps/rejected": Mean.of(policy.rejected.sum),
        "logps/accuracies": Mean.of(won(policy.chosen.sum, policy.rejected.sum)),
    }
