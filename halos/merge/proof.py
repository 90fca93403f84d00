"""Prove a merge: compare every tensor on the disk, and the outputs of the model as a user loads it, with the trained model."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from halos.confined import NO_CODE, SAFELY
from halos.errors import UserError, user_errors
from halos.logps.auto import CLASSES
from halos.logps.modes import adapter_off
from halos.logps.vocabulary import Vocabulary, grow
from halos.merge import deviation, expected, probe
from halos.merge.probe import Noise, ProbeOutputs, bit_sum, outputs_and_routes, outputs_of, rms
from halos.merge.routing import decisions, rerouted_fraction
from halos.merge.safetensors_io import SafeFile, blocks
from halos.reward_kind import RewardKind

FACTOR = 3.0  # times the model's own rounding noise; no correct merge of the tests is off by more than 1.7 times it
SINGLE = torch.finfo(torch.float32).eps
FEW = 6  # routing decisions that may differ beyond those that noise explains: no correct merge of the tests has more than 5
WORST = 5  # tensors named in the report
MAY_CHANGE = {
    "architectures", "dtype", "transformers_version", "num_labels", "id2label", "label2id", "problem_type", "pad_token_id",
    "use_cache", "classifier_dropout", "vocab_size", "tie_word_embeddings", "quantization_config", "_name_or_path",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """The inputs of a merge, and how the trained model was built."""

    base: Path
    adapter: Path
    reward: RewardKind | None
    dtype: torch.dtype
    vocabulary: int = 0  # number of ids of the trained model, where they are more than the base's
    tokens: Sequence[int] = ()  # ids that were new to the base

    @property
    def auto(self) -> Any:
        return CLASSES[self.reward]

    @property
    def labels(self) -> dict[str, Any]:
        return self.reward.labels if self.reward else {}

    def empty_model(self) -> PreTrainedModel:
        """Build the base on the meta device, without weights."""
        with user_errors(f"no model can be built from {self.base}/config.json"), torch.device("meta"):
            config = AutoConfig.from_pretrained(self.base, **NO_CODE, **self.labels)
            return self.auto.from_config(config, **NO_CODE)


@dataclass(frozen=True, slots=True)
class Proof:
    """All faults, and how far tensors and outputs deviate."""

    faults: list[str]
    tensors: list[deviation.Deviation]  # the worst first
    error: float  # of the outputs, by `measure`
    tolerance: float
    measure: str

    @property
    def holds(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        if self.faults:
            more = f", and {len(self.faults) - 1} more" if len(self.faults) > 1 else ""
            return f"{self.faults[0]}{more}"
        return (
            f"{len(self.tensors)} tensors are what they must be, {self.measure} {self.error:.1e} (allowed {self.tolerance:.1e})"
        )

    def report(self) -> dict[str, Any]:
        worst = [
            {"name": each.name, "relative_error": _finite(each.error), "of_allowed": _finite(each.allowed)}
            for each in self.tensors[:WORST]
        ]
        logits = {"measure": self.measure, "error": _finite(self.error), "tolerance": _finite(self.tolerance)}
        return {"holds": self.holds, "faults": self.faults, "logits": logits, "tensors": len(self.tensors), "worst": worst}


def _finite(value: float) -> float | None:
    """Replace nan and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


# --- the three parts -------------------------------------------------------------------------------------------------


def prove(case: Case, merged: Path, live: ProbeOutputs | None = None) -> Proof:
    """Compare `merged` with the trained model: files and tensors, then configuration and keys, then log-probs or scores.

    `live` are the outputs of the trained model itself. Unless they were computed in float32 from a base that is not quantised,
    and the merged weights are float32 too, base and adapter are also loaded by PEFT: one model after the other, not two at once.
    """
    try:
        model = expected.expected_model(case.base, case.adapter, case.empty_model(), case.vocabulary, case.tokens)
        tensors, faults = deviation.compare(merged, model.tensors, case.dtype)
        faults += _config_faults(case, merged, tied=model.tied)
        faults += _scale_faults(model.scales, live.scales) if live else []
        faults += _adapter_faults(case.adapter, live.bit_sums) if live and live.bit_sums is not None else []
    except UserError as error:
        tensors, faults = [], [str(error)]
    if faults:
        return Proof(faults, tensors, math.nan, math.nan, "log-probs not compared")
    ids = live.ids if live else _probe(case, merged)
    exact = live is not None and live.unit <= SINGLE and live.without_adapter is None and case.dtype is torch.float32
    stored = None if exact else _probe_stored(case, ids, live)
    comparisons, faults = _compare_outputs(case, merged, live, stored)
    worst = max(comparisons, key=lambda each: each.fraction)
    faults += [str(each) for each in comparisons if not each.holds]
    return Proof(faults, tensors, worst.error, worst.tolerance, worst.measure)


def _config_faults(case: Case, merged: Path, *, tied: bool) -> list[str]:
    """Return the settings of the merged model that differ from the base's, other than those that a merge may change."""
    base, config = (AutoConfig.from_pretrained(path, **NO_CODE, **case.labels) for path in (case.base, merged))
    before, after = _fixed(base.to_dict()), _fixed(config.to_dict())
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    faults = [f"config.json: {name} is {after.get(name)!r} and the base's is {before.get(name)!r}" for name in names]
    expected_size, size = max(base.get_text_config().vocab_size, case.vocabulary), config.get_text_config().vocab_size
    if size != expected_size:
        faults.append(f"config.json: vocab_size is {size} instead of {expected_size}")
    if (ties := bool(getattr(config, "tie_word_embeddings", False))) != tied and not case.reward:
        faults.append(f"config.json: tie_word_embeddings is {ties} instead of {tied}")
    return faults


def _fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a merge must not change, of nested configurations too."""
    return {
        name: _fixed(value) if isinstance(value, Mapping) else value for name, value in settings.items() if name not in MAY_CHANGE
    }


def _scale_faults(saved: Mapping[str, float], used: Mapping[str, float]) -> list[str]:
    """Return the layers whose scale in the saved adapter differs from the one they were trained with."""
    return [f"{layer} was trained with a scale of {used.get(layer)} and is saved with {saved.get(layer)}"
            for layer in sorted(saved.keys() | used.keys())
            if not math.isclose(saved.get(layer, math.nan), used.get(layer, math.nan), rel_tol=1e-9)]  # fmt: skip


def _adapter_faults(adapter: Path, trained: Collection[int]) -> list[str]:
    """Return the tensors of the saved adapter that differ from the model's, by the bit sums of the `trained` ones."""
    file, wrap = SafeFile(adapter / "adapter_model.safetensors"), 2**64
    sums = {name: sum(map(bit_sum, blocks(file, name))) % wrap for name in file.names if ".original_module." not in name}
    expected_sums = {number % wrap for number in trained}
    faults = [
        f"{name} of the adapter differs from the trained model's" for name, each in sums.items() if each not in expected_sums
    ]
    missing = len(expected_sums - set(sums.values()))
    return faults or ([f"{missing} tensors that were trained are not in the adapter"] if missing else [])


# --- outputs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    """The merged model's values against those of one probe."""

    measure: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance

    @property
    def fraction(self) -> float:
        """The error as a fraction of the tolerance; nan, which is wrong, counts as infinite."""
        fraction = self.error / (self.tolerance or math.ulp(0.0))
        return fraction if fraction == fraction else math.inf

    def __str__(self) -> str:
        return f"{self.measure} {self.error:.1e}, allowed {self.tolerance:.1e}"


def _probe(case: Case, merged: Path) -> Tensor:
    text = AutoConfig.from_pretrained(merged, **NO_CODE).get_text_config()
    vocabulary = Vocabulary(case.vocabulary, tuple(case.tokens))
    return probe.probe_ids(
        vocabulary, text.vocab_size, longest=getattr(text, "max_position_embeddings", None), reward=case.reward
    )


def _probe_stored(case: Case, ids: Tensor, live: ProbeOutputs | None) -> ProbeOutputs:
    """Return the outputs of base and adapter in float32, both loaded by PEFT, along the routes of `live` if given."""
    other_head = case.reward is not None  # the base's may have other labels; the adapter has the trained one
    labels = {**case.labels, "ignore_mismatched_sizes": other_head}
    model = case.auto.from_pretrained(case.base, dtype=torch.float32, **SAFELY, **labels)
    grow(model, case.vocabulary, case.tokens)
    adapted = PeftModel.from_pretrained(model, str(case.adapter)).eval()
    temperature = live.temperature if live else 1.0
    settings: dict[str, Any] = {"temperature": temperature, "reward": case.reward, "routes": live.routes if live else ()}
    values, routes = outputs_and_routes(adapted, ids, **settings)
    with adapter_off(adapted):
        without_adapter = outputs_of(adapted, ids, **settings)
    return ProbeOutputs(ids, values, {}, SINGLE, temperature=temperature, without_adapter=without_adapter, routes=routes)


def _compare_outputs(
    case: Case, merged: Path, live: ProbeOutputs | None, stored: ProbeOutputs | None
) -> tuple[list[Comparison], list[str]]:
    """Compare the merged model, loaded by from_pretrained in float32, with the trained model and with base and adapter. Also
    return the keys that loading finds missing or unexpected."""
    model, report = case.auto.from_pretrained(merged, dtype=torch.float32, output_loading_info=True, **SAFELY)
    faults = [f"from_pretrained finds {kind.replace('_', ' ')}: {', '.join(sorted(map(str, report[kind]))[:3])}"
              for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[kind]]  # fmt: skip
    first = live or stored
    assert first is not None
    settings: dict[str, Any] = {"temperature": first.temperature, "reward": case.reward, "routes": first.routes}
    values, routes = outputs_and_routes(model.eval(), first.ids, **settings)
    loaded = ProbeOutputs(first.ids, values, {}, SINGLE, routes=routes)
    kind, rounded = "scores" if case.reward else "log-probs", torch.finfo(case.dtype).eps
    count = decisions(first.routes)
    in_half = probe.rerouted_in_half(model, first.ids, **settings) if count and live is not None and live.unit > SINGLE else 0.0

    @cache
    def noise_of(unit: float) -> Noise:  # often the same for all comparisons
        return probe.noise(model, loaded, unit, **settings)

    def compared(what: str, one: ProbeOutputs, other: ProbeOutputs, *units: float) -> list[Comparison]:
        """Compare outputs and routes of two computations, each of which may be off by its own rounding `units`."""
        noise = noise_of(math.hypot(*units))
        measure = f"typical difference of {kind} {what}"
        results = [Comparison(measure, rms(one.values - other.values), FACTOR * rms(noise.moved))]
        if count:
            usual = max(noise.rerouted, in_half if one is live or other is live else 0.0)
            allowed = FACTOR * usual + FEW / count
            results.append(Comparison(f"difference of routes {what}", rerouted_fraction(one.routes, other.routes), allowed))
        return results

    comparisons = []
    if live is not None and live.without_adapter is None:
        comparisons += compared("from the trained model", loaded, live, rounded, live.unit, SINGLE)
    if stored is not None:
        comparisons += compared("from base and adapter as PEFT loads them", loaded, stored, rounded, SINGLE, SINGLE)
    if live is not None and stored is not None and live.without_adapter is None:
        comparisons += compared("of the trained model from what was saved of it", live, stored, live.unit, SINGLE, SINGLE)
    elif live is not None and stored is not None:
        comparisons.append(_quantised(live, stored))
    return comparisons, faults


def _quantised(live: ProbeOutputs, stored: ProbeOutputs) -> Comparison:
    """Compare only what the adapter adds, since a quantised base differs from the disk's, within what quantising changes."""
    assert live.without_adapter is not None
    assert stored.without_adapter is not None
    moved = live.without_adapter - stored.without_adapter  # what quantising changes
    error = rms((live.values - live.without_adapter) - (stored.values - stored.without_adapter))
    return Comparison("typical difference of what the adapter adds", error, FACTOR * rms(moved))


def write_report(path: Path, proof: Proof, facts: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**proof.report(), **facts}, indent=1))
