"""A merge proves itself: the merged directory, loaded as any user would, against the model that was trained."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

EXACT = 1e-5  # in float32, of the largest logit
ROUNDED = 2.0  # in a half type, times what the adapter model itself loses by computing in that type


@dataclass(frozen=True, slots=True)
class Proof:
    """How far the merged model's logits are from the trained one's, as a share of the largest."""

    error: float
    tolerance: float
    missing: list[str]
    unexpected: list[str]
    measure: str

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance and not self.missing and not self.unexpected

    def __str__(self) -> str:
        if self.missing or self.unexpected:
            return f"tensors missing {self.missing[:3]}, unexpected {self.unexpected[:3]}"
        return f"logits differ by {self.error:.1e} of the {self.measure} (allowed {self.tolerance:.0e})"


def probe(vocabulary: int, length: int = 24, rows: int = 8) -> Tensor:
    """Fixed token ids (rows, length), spread over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (rows, length), generator=generator)


def distance(logits: Tensor, truth: Tensor, *, half: bool) -> float:
    """In float32 the largest difference over the largest logit; in a half type the typical (RMS) one over the typical."""
    difference, truth = logits.double() - truth.double(), truth.double()
    if half:
        return (difference.square().mean().sqrt() / truth.square().mean().sqrt().clamp(min=1e-9)).item()
    return (difference.abs().max() / truth.abs().max().clamp(min=1e-9)).item()


@torch.no_grad()
def adapter_logits(base: Path, adapter: Path, ids: Tensor, *, reward: bool, dtype: torch.dtype, vocabulary: int) -> Tensor:
    """What base and adapter compute together, both read from disk; embeddings grown to `vocabulary` where it is larger."""
    model = _auto(reward).from_pretrained(base, dtype=dtype, **({"num_labels": 1} if reward else {}))
    if model.get_input_embeddings().weight.shape[0] < vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    if dtype is torch.float32:
        return _run(adapted, ids)
    with torch.autocast("cpu", dtype=dtype):
        return _run(adapted, ids)


@torch.no_grad()
def prove(merged: Path, ids: Tensor, truth: Tensor, *, reward: bool, dtype: torch.dtype, noise: float = 0.0) -> Proof:
    """Load `merged` with plain from_pretrained and compare with `truth`, the adapter model's float32 logits for `ids`.

    `truth` is (rows, length, vocabulary), or (rows, 1) for a reward model. `noise` is the distance from it that the
    adapter model itself has when it computes in `dtype`, where that is a half type.
    """
    model, report = _auto(reward).from_pretrained(merged, dtype=dtype, output_loading_info=True)
    half = dtype is not torch.float32
    error = distance(_run(model.eval(), ids), truth, half=half)
    tolerance = ROUNDED * noise if half else EXACT
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    return Proof(error, tolerance, missing, unexpected, "typical logit" if half else "largest logit")


def _auto(reward: bool) -> Any:
    return AutoModelForSequenceClassification if reward else AutoModelForCausalLM


def _run(model: Any, ids: Tensor) -> Tensor:
    """One row at a time: a reward model without a padding token takes no batch."""
    return torch.cat([model(input_ids=row[None]).logits.float() for row in ids])


def write_report(path: Path, proof: Proof, facts: dict[str, Any]) -> None:
    checks = {"holds": proof.holds, "logits_error": proof.error, "logits_tolerance": proof.tolerance}
    keys = {"missing_keys": proof.missing, "unexpected_keys": proof.unexpected}
    path.write_text(json.dumps({**checks, **keys, **facts}, indent=1))
