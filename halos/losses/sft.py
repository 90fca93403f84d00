"""Supervised fine-tuning: imitate the completion."""

from halos.types import Loss, Mean, TokenLogps


def sft(policy: TokenLogps) -> Loss:
    """-log pi(y_t | x, y_<t); its denominator is the number of scored tokens in the global batch."""
    metrics = {"logps/completion": Mean.of(policy.sum), "nll": Mean.of(-policy.values, policy.mask)}
    return Loss(-policy.values, metrics, per="token")
