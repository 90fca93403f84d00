"""A merge proves itself: every tensor on the disk, and the merged model, loaded as any user would, against what was trained."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from halos.errors import UserError
from halos.logps.vocabulary import grow
from halos.merge import expected

EXACT = 1e-5  # in float32, of the largest logit
ROUNDED = 1.5  # in a half type, times the KL that the adapter model itself loses by computing in that type
SCORED = 2.0  # a reward model has no distribution: times the typical error of its scores, and those are few
ROWS = 8
FOR_SCORES = 64  # rows: each has but one
WORST = 5  # tensors named in the report
FREE = {"architectures", "dtype", "transformers_version", "num_labels", "id2label", "label2id", "problem_type", "pad_token_id",
        "use_cache", "vocab_size", "tie_word_embeddings", "quantization_config", "_name_or_path"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """What was merged from what, and how the trained model was built."""

    base: Path
    adapter: Path
    reward: bool
    dtype: torch.dtype
    vocabulary: int = 0  # ids that the trained model had, where they are more than the base's
    tokens: Sequence[int] = ()  # those of them that were new

    @property
    def auto(self) -> Any:
        return AutoModelForSequenceClassification if self.reward else AutoModelForCausalLM

    @property
    def labels(self) -> dict[str, int]:
        return {"num_labels": 1} if self.reward else {}

    def bare(self) -> PreTrainedModel:
        """The base's structure, without weights."""
        config = AutoConfig.from_pretrained(self.base, **self.labels)
        with torch.device("meta"):
            return self.auto.from_config(config)


@dataclass(frozen=True, slots=True)
class Proof:
    """All that is wrong, and how far tensors and logits are from the truth."""

    faults: list[str]
    tensors: list[expected.Found]  # the worst first
    error: float  # of the logits, by `measure`
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
    """JSON has no nan and no infinity."""
    return value if math.isfinite(value) else None


def probe(vocabulary: int, length: int = 24, rows: int = ROWS) -> Tensor:
    """Fixed token ids (rows, length), spread over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (rows, length), generator=generator)


# --- the three parts -------------------------------------------------------------------------------------------------


def prove(case: Case, merged: Path, logits: Callable[[Tensor], Tensor] | None = None) -> Proof:
    """Whether `merged` is the trained model: files and tensors, then configuration and keys, then logits.

    `logits` is the trained model's own float32 forward, where it is at hand; else base and adapter are loaded, one model
    after the other, never two at once.
    """
    try:
        wanted = expected.truths(case.base, case.adapter, case.bare(), case.vocabulary, case.tokens)
        tensors, faults = expected.compare(merged, wanted.tensors, case.dtype)
        faults += _of_config(case, merged, tied=wanted.tied)
    except UserError as error:
        tensors, faults = [], [str(error)]
    if faults:
        return Proof(faults, tensors, math.nan, math.nan, "logits not compared")
    ids = probe(AutoConfig.from_pretrained(merged).get_text_config().vocab_size, rows=FOR_SCORES if case.reward else ROWS)
    truth = logits(ids) if logits is not None and case.dtype is torch.float32 else adapter_logits(case, ids, torch.float32)
    found, faults = _loaded(case, merged, ids)
    measure, error, tolerance = "largest difference over the largest logit", _largest(found, truth), EXACT
    if case.dtype is not torch.float32:
        rounded = adapter_logits(case, ids, case.dtype)
        distance, factor = (_typical, SCORED) if case.reward else (_kl, ROUNDED)
        measure = "typical difference of scores" if case.reward else "KL from the trained model in float32"
        error, tolerance = distance(found, truth), factor * distance(rounded, truth)
    if not error <= tolerance:
        faults.append(f"logits: {measure} {error:.1e}, allowed {tolerance:.1e}")
    return Proof(faults, tensors, error, tolerance, measure)


def _of_config(case: Case, merged: Path, *, tied: bool) -> list[str]:
    """Settings of the merged model that are not the base's, other than those that a merge may move."""
    base, made = (AutoConfig.from_pretrained(path, **case.labels) for path in (case.base, merged))
    was, now = _settled(base.to_dict()), _settled(made.to_dict())
    names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    faults = [f"config.json: {name} is {now.get(name)!r} and the base's is {was.get(name)!r}" for name in names]
    size, have = max(base.get_text_config().vocab_size, case.vocabulary), made.get_text_config().vocab_size
    if have != size:
        faults.append(f"config.json: vocab_size is {have} instead of {size}")
    if (ties := bool(getattr(made, "tie_word_embeddings", False))) != tied and not case.reward:
        faults.append(f"config.json: tie_word_embeddings is {ties} instead of {tied}")
    return faults


def _settled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a merge leaves alone, in nested configurations too."""
    return {
        name: _settled(value) if isinstance(value, Mapping) else value for name, value in settings.items() if name not in FREE
    }


@torch.no_grad()
def adapter_logits(case: Case, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What base and adapter compute together in `dtype`, both read from disk."""
    model = case.auto.from_pretrained(case.base, dtype=dtype, **case.labels)
    grow(model, case.vocabulary, case.tokens)
    adapted = PeftModel.from_pretrained(model, str(case.adapter)).eval()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        return _run(adapted, ids)


@torch.no_grad()
def _loaded(case: Case, merged: Path, ids: Tensor) -> tuple[Tensor, list[str]]:
    """The merged model's logits, loaded by plain from_pretrained; keys and ties that are not as they should be."""
    model, report = case.auto.from_pretrained(merged, dtype=case.dtype, output_loading_info=True)
    faults = [f"from_pretrained finds {kind.replace('_', ' ')}: {', '.join(sorted(map(str, report[kind]))[:3])}"
              for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[kind]]  # fmt: skip
    return _run(model.eval(), ids), faults


def _run(model: Any, ids: Tensor) -> Tensor:
    """One row at a time: a reward model without a padding token takes no batch."""
    return torch.cat([model(input_ids=row[None]).logits.float() for row in ids])


def _largest(logits: Tensor, truth: Tensor) -> float:
    return ((logits - truth).abs().max() / truth.abs().max().clamp(min=1e-9)).item()


def _typical(scores: Tensor, truth: Tensor) -> float:
    return (scores.double() - truth.double()).square().mean().sqrt().item()


def _kl(logits: Tensor, truth: Tensor) -> float:
    """Nats a token, the mean over the probe; a row at a time, since in float64 a large vocabulary weighs as much as a model."""
    total = 0.0
    for mine, wanted in zip(logits, truth, strict=True):
        log_q, log_p = mine.double().log_softmax(-1), wanted.double().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return total / len(truth)


def write_report(path: Path, proof: Proof, facts: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**proof.report(), **facts}, indent=1))
