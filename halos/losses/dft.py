"""DFT: supervised fine-tuning whose tokens are weighed by their own probability."""

from halos.types import Loss, Mean, TokenLogps


def dft(policy: TokenLogps) -> Loss:
    """-sg(pi(y_t)) log pi(y_t); its denominator is the number of scored tokens in the global batch. Eq. 9 of arXiv:2508.05629."""
    values = policy.values
    metrics = {"logps/completion": Mean.of(policy.sum), "nll": Mean.of(-values, policy.mask)}
    return Loss(-values.detach().exp() * values, metrics, per="token")
