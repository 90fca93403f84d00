"""Supervised fine-tuning: imitate the completion."""

from halos.types import Loss, Mean, TokenLogps


def sft(policy: TokenLogps) -> Loss:
    """-log pi(y_t | x, y_<t); its denominator is the number of scored tokens in the global batch."""
    return Loss(-policy.values, {"logps/completion": Mean.of(policy.sum)}, per="token")
