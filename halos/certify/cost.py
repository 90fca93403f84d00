"""What a loss costs beside the models: forward passes, collectives, and bytes that it keeps for its backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from halos.certify.case import synthetic_case
from halos.certify.own import OwnLoss
from halos.certify.verdict import Finding, passed
from halos.config.bind import LossSpec
from halos.types import Mismatched

COUNTS, LENGTH = (8, 32), 24  # items of a micro-batch, and most scored tokens of a completion


def cost(subject: OwnLoss) -> Finding:
    return passed(f"{forwards(subject.spec)}; {collectives(subject.spec)}; {_memory(subject)}")


def forwards(spec: LossSpec) -> str:
    """Of a micro-batch. Where the reference's log-probs are kept, it computes them once for the whole run."""
    models = "policy 1 forward" + (", reference 1 (or kept)" if spec.needs_reference else "")
    if spec.statistics is None:
        return models
    when = "always" if spec.statistics_inputs is Mismatched else "with several micro-batches"
    return f"{models}; again without gradient for its statistics, {when}"


def collectives(spec: LossSpec) -> str:
    """Of a step: the metrics of every loss are summed together with the gradient norm."""
    return f"{1 + (spec.statistics is not None)} collective{'s' if spec.statistics is not None else ''} a step"


def _memory(subject: OwnLoss) -> str:
    few, many = (_kept_bytes(subject, count) for count in COUNTS)
    more = f", and {many:.2g} with {COUNTS[1]}: it grows with their product" if many > 1.5 * few else ""
    return f"keeps {few:.2g} bytes a scored token{f' in micro-batches of {COUNTS[0]} rows' if more else ''}{more}"


def _kept_bytes(subject: OwnLoss, count: int) -> float:
    """Bytes a scored token in float32 that autograd keeps for the loss, its inputs not counted."""
    case = synthetic_case(subject, count=count, width=LENGTH, dtype=torch.float32)
    tokens = sum(int(completion.scored.sum()) for item in case.items for completion in item.completions)
    arguments, more = subject.inputs_of(case)
    kept = dict[int, int]()
    inputs = {storage.data_ptr() for storage in _storages(arguments)}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = subject.spec.function(*arguments, *more)
    assert loss is not None, "its graph has to live while bytes are counted"
    return sum(kept.values()) / max(1, tokens)


def _storages(value: object) -> list[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        return [value.untyped_storage()]
    parts = value if isinstance(value, list) else [getattr(value, name) for name in getattr(value, "__dataclass_fields__", ())]
    return [storage for part in parts for storage in _storages(part)]
