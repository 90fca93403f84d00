"""A sampling stage compares its engine with the policy: a probe before it samples, some of the samples afterwards."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from halos.config.schema import Sampler
from halos.rollout import rescore
from halos.rollout.engines.engine import Engine
from halos.rollout.ranks import local_device
from halos.rollout.types import TRAIN, Request, Row, Sample


class RescoringPolicy:
    """The policy, loaded at the first comparison; the model that an engine loaded is used where there is one."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self.model: Any = None
        self.seconds = 0.0  # of comparing, without loading

    def __call__(self, pairs: Sequence[rescore.Pair], temperature: float) -> list[np.ndarray]:
        from halos.rollout.kl import rescore_with

        if self.model is None:
            self.model = self._load()
        began = time.perf_counter()
        logps = rescore_with(self.model, pairs, temperature)
        self.seconds += time.perf_counter() - began
        return logps

    def refuse_other(
        self, engine: Engine, requests: Sequence[Request], policy: str, previous: Callable[[], Any] | None = None
    ) -> None:
        """Raises UserError, with the remedy, where the engine does not sample from the policy, or still from the one before it,
        which `previous` loads."""
        probed = rescore.probe_requests(requests)
        samples = engine.probe(probed)
        if not samples:
            return
        probe = rescore.compared(samples, probed, self)
        rescore.refuse_other_policy(probe, self, where=engine.where, policy=policy)
        if previous is not None:
            before = RescoringPolicy(previous)
            logps = np.concatenate(rescore.at_temperatures(probe.pairs, probe.temperatures, before))
            rescore.refuse_previous_policy(probe, logps, where=engine.where, policy=policy)

    def mismatch(self, rows: Sequence[Row], requests: Sequence[Request], sampler: Sampler, count: int) -> dict[str, Any]:
        """Metrics of `count` samples: how far the engine's log-probs of a token are from the policy's own."""
        ids = {request.key: request.ids for request in requests}
        some = rescore.evenly([Sample.from_row(row, "a sample") for row in rows], count)
        if not some:
            return {}
        differences = rescore.differences(some, [ids[sample.key] for sample in some], self)
        mean, largest, bound = float(differences.mean()), float(differences.max()), rescore.warned_above(sampler)
        if mean > bound:
            tqdm.write(f"warning: {rescore.warning(mean, largest, len(some), bound)}", file=sys.stderr)
        return {"mismatch/mean": mean, "mismatch/max": largest, "rescored": len(some)}


def divergence(
    kept: Sequence[tuple[Request, Row]], load: Callable[[], Any], temperature: float, count: int
) -> tuple[dict[str, Any], float]:
    """The mean log pi / pi_ref of completions over some samples: an estimate of the KL, in nats per completion. And the seconds
    that it took, once the reference was loaded."""
    from halos.rollout.kl import mean_log_ratio

    some = [(request.ids, row["output_ids"], row["logps"]) for request, row in kept
            if row.get("logps") and row.get("split", TRAIN) == TRAIN]  # fmt: skip
    some = some[:: max(1, len(some) // count)][:count]
    if not some:
        return {}, 0.0
    reference, began = load(), time.perf_counter()
    measured = {"kl": mean_log_ratio(reference, some, temperature), "kl_samples": len(some)}
    return measured, time.perf_counter() - began


def device_beside(directory: Path) -> Any:
    """This rank's GPU where a model of these files has room on it beside a server, else the CPU."""
    import torch

    device = local_device()
    if device.type != "cuda":
        return device
    files = directory.glob("*.safetensors") if directory.is_dir() else [directory]
    needed = 1.2 * sum(path.stat().st_size for path in files)
    return device if torch.cuda.mem_get_info(device)[0] > needed else torch.device("cpu")
