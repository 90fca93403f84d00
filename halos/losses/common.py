"""What preference losses report, under the field's names."""

from torch import Tensor

from halos.types import Mean, Pair


def pair_metrics(policy: Pair, chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Mean]:
    """Implicit rewards (rows,), and two accuracies: of the implicit reward, and of the policy's own ranking.

    They differ: where policy == reference every implicit reward is 0, so its accuracy is 0 by ties, while the ranking
    accuracy is the reference's own.
    """
    return {
        "rewards/chosen": Mean.of(chosen_rewards),
        "rewards/rejected": Mean.of(rejected_rewards),
        "rewards/margins": Mean.of(chosen_rewards - rejected_rewards),
        "rewards/accuracies": Mean.of(chosen_rewards > rejected_rewards),
        "logps/chosen": Mean.of(policy.chosen.sum),
        "logps/rejected": Mean.of(policy.rejected.sum),
        "logps/accuracies": Mean.of(policy.chosen.sum > policy.rejected.sum),
    }
