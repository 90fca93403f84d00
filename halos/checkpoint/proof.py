"""A merge proves itself: the merged directory, loaded as any user would, against the model that was trained."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # of the largest logit
HALF_TOLERANCE = 5e-2  # one rounding of every weight to a half type; wrong scaling or a lost bias is far beyond it


@dataclass(frozen=True, slots=True)
class Proof:
    """How far the merged model's logits are from the trained one's, as a share of the largest."""

    error: float
    tolerance: float
    missing: list[str]
    unexpected: list[str]

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance and not self.missing and not self.unexpected

    def __str__(self) -> str:
        if self.missing or self.unexpected:
            return f"tensors missing {self.missing[:3]}, unexpected {self.unexpected[:3]}"
        return f"logits differ by {self.error:.1e} of the largest (allowed {self.tolerance:.0e})"


def probe(vocabulary: int, length: int = 24, rows: int = 2) -> Tensor:
    """Fixed token ids (rows, length), spread over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (rows, length), generator=generator)


@torch.no_grad()
def prove(merged: Path, ids: Tensor, truth: Tensor, *, reward: bool, dtype: torch.dtype) -> Proof:
    """Load `merged` with plain from_pretrained and compare with `truth`, the trained model's logits for `ids`.

    `truth` is (rows, length, vocabulary), or (rows, 1) for a reward model.
    """
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    model, report = auto.from_pretrained(merged, dtype=dtype, output_loading_info=True)
    logits = model.eval()(input_ids=ids).logits.float()
    error = ((logits - truth.float()).abs().max() / truth.float().abs().max().clamp(min=1e-6)).item()
    tolerance = TOLERANCE.get(dtype, HALF_TOLERANCE)
    return Proof(error, tolerance, sorted(report["missing_keys"]), sorted(report["unexpected_keys"]))


def write_report(path: Path, proof: Proof, facts: dict[str, Any]) -> None:
    checks = {"holds": proof.holds, "logits_error": proof.error, "logits_tolerance": proof.tolerance}
    keys = {"missing_keys": proof.missing, "unexpected_keys": proof.unexpected}
    path.write_text(json.dumps({**checks, **keys, **facts}, indent=1))
