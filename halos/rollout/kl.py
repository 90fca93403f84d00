"""A policy's own log-probs of sampled tokens, and the KL divergence that is estimated from them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from halos.data.collate import pack_on_host
from halos.examples import Completion
from halos.logps.attention import SEGMENTS, register
from halos.logps.model import LanguageModel
from halos.rollout.rescore import Pair
from halos.types import Acted

AT_ONCE = 8  # sequences of one forward pass


@torch.no_grad()
def token_logps(module: Any, pairs: Sequence[Pair], *, device: Any, what: str) -> list[np.ndarray]:
    """The log-probs of the sampled ids by a module of halos.logps.model: a (tokens,) float64 for each pair."""
    logps = []
    for start in tqdm(range(0, len(pairs), AT_ONCE), desc=what, unit="batch", delay=2, leave=False, disable=None):
        some = pairs[start : start + AT_ONCE]
        rows = [(np.array(prompt), Completion(np.array(ids), np.ones(len(ids), bool))) for prompt, ids in some]
        output = module(pack_on_host(rows).to(device))
        values = (output.logps if isinstance(output, Acted) else output).values.double().cpu().numpy()
        logps += [values[row, : len(ids)] for row, (_, ids) in enumerate(some)]
    return logps


def rescore_with(model: Any, pairs: Sequence[Pair], temperature: float, *, what: str = "rescoring") -> list[np.ndarray]:
    """The same by a model of transformers that was loaded for it; 0, greedy, is scored at 1."""
    register()
    model.set_attn_implementation(SEGMENTS)
    return token_logps(LanguageModel(model, temperature=temperature or 1.0), pairs, device=model.device, what=what)


def mean_log_ratio(
    reference: Any, samples: Sequence[tuple[Sequence[int], Sequence[int], Sequence[float]]], temperature: float
) -> float:
    """The mean of log pi(y|x) - log pi_ref(y|x) over samples (prompt ids, sampled ids, their log-probs), in nats per completion.

    Both log-probs are of the softmax at the sampling temperature.
    """
    logps = rescore_with(reference, [(tuple(prompt), tuple(ids)) for prompt, ids, _ in samples], temperature, what="KL")
    return sum(sum(own) - float(ours.sum()) for (_, _, own), ours in zip(samples, logps, strict=True)) / len(samples)
