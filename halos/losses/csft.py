"""Conditional SFT: train on good and bad completions alike, each prefixed with a control token that says which it is."""

from halos.examples import SampledTokens
from halos.losses.sft import sft
from halos.types import Demonstration, Judgement, Loss, TokenLogps


def examples(row: Judgement, *, desirable_token: str, undesirable_token: str) -> Demonstration:
    """The completion prefixed with its control token (arXiv:2302.08582, section 2), as a new example; `row` is not modified."""
    token = desirable_token if row.desirable else undesirable_token
    first, *rest = row.completion
    cut = tuple(SampledTokens(cut=each.cut) for each in row.sampled)  # the ids would lack the control token
    return Demonstration(row.prompt, ({**first, "content": token + str(first.get("content") or "")}, *rest), sampled=cut)


def csft(policy: TokenLogps) -> Loss:
    """Cross-entropy over control token and completion (conditional training, section 2 of arXiv:2302.08582)."""
    return sft(policy)
