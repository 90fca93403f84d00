"""The loss of reward models: the chosen completion of a pair should score higher (Bradley-Terry)."""

from typing import Annotated

from torch.nn.functional import logsigmoid

from halos.losses.common import won
from halos.types import Loss, Mean, PairScores, Range


def bradley_terry(scores: PairScores, *, centering: Annotated[float, Range(least=0)]) -> Loss:
    """-log sigmoid(r_w - r_l - m) + c (r_w + r_l)^2.

    Eq. 1 of arXiv:2203.02155; the margin m is that of arXiv:2307.09288, section 3.2.2; the centering term that of
    arXiv:2312.09244.
    """
    margin = scores.chosen - scores.rejected
    values = -logsigmoid(margin - scores.margin) + centering * (scores.chosen + scores.rejected) ** 2
    metrics = {
        "accuracy": Mean.of(won(scores.chosen, scores.rejected)),
        "rewards/chosen": Mean.of(scores.chosen),
        "rewards/rejected": Mean.of(scores.rejected),
        "rewards/margins": Mean.of(margin),
    }
    return Loss(values, metrics)
