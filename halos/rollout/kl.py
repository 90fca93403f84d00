"""KL divergence of a policy from its reference, estimated from the policy's samples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from halos.data.collate import pack
from halos.examples import Completion
from halos.logps.attention import SEGMENTS, register
from halos.logps.model import LanguageModel

AT_ONCE = 8  # sequences of one forward pass


@torch.no_grad()
def mean_log_ratio(
    reference: Any, samples: Sequence[tuple[Sequence[int], Sequence[int], Sequence[float]]], temperature: float
) -> float:
    """The mean of log pi(y|x) - log pi_ref(y|x) over samples (prompt ids, sampled ids, their log-probs), in nats per completion.

    Both log-probs are of the softmax at the sampling temperature.
    """
    register()
    reference.set_attn_implementation(SEGMENTS)
    module, total = LanguageModel(reference, temperature=temperature), 0.0
    for start in tqdm(range(0, len(samples), AT_ONCE), desc="KL", unit="batch", delay=2, leave=False, disable=None):
        some = samples[start : start + AT_ONCE]
        rows = [(np.array(prompt), Completion(np.array(ids), np.ones(len(ids), bool))) for prompt, ids, _ in some]
        logps = module(pack(rows).to(reference.device)).sum.double().cpu()
        total += sum(sum(own) for _, _, own in some) - float(logps.sum())
    return total / len(samples)
