"""What a model keeps for its backward pass, and computes, per token: its own forward pass on tensors without storage.

Shapes alone decide both, so no weights are read. Attention is that of the run, on the run's device.
"""

import logging
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from halos.data.collate import pack
from halos.examples import Completion, PackRow
from halos.logps.hidden import backbone_of, hidden_states
from halos.logps.model import bare
from halos.logps.modes import adapter_off
from halos.logps.varlen import layout_of

log = logging.getLogger(__name__)

TRUNK, BRANCH = 128, 64  # tokens of the sequences that are tried


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes and FLOPs of the layers, without the head."""

    kept: float  # bytes for each token
    kept_by_branches: float  # further bytes for each token that a further branch of a shared prompt attends to
    working: float  # bytes for each token that live while a layer is computed
    forward: float  # bytes for each token at the peak of a forward pass without gradients and adapter
    flops: float  # of the forward pass, for each token


def of(model: nn.Module, device: torch.device) -> Activations | None:
    """Measure a model on the meta device, in the mode in which it trains; None where its forward needs real values.

    Its parameters are replaced by tensors without storage: do not use it afterwards.
    """
    if backbone_of(bare(model)) is None:
        return None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            _replace_tensors(model, device)
            model.train()
            alone = _forward(model, [_row(TRUNK, 2 * BRANCH)], device)
            shared = _forward(model, [_row(TRUNK, BRANCH)] * 2, device)
            with adapter_off(model):
                passed = _forward(model.eval(), [_row(TRUNK, 2 * BRANCH)], device, grad=False)
    except Exception as error:  # any architecture may need the values of a tensor
        log.debug("activations cannot be estimated: %s: %s", type(error).__name__, error)
        return None
    finally:
        layout_of.cache_clear()  # its tensors have no storage, and a run may follow in this process
    tokens = TRUNK + 2 * BRANCH
    more = max(0.0, shared.kept - alone.kept) / (TRUNK + BRANCH)
    working = (alone.peak - alone.kept) / tokens
    return Activations(alone.kept / tokens, more, working, passed.peak / tokens, alone.flops / tokens)


@dataclass(frozen=True, slots=True)
class _Pass:
    kept: int  # bytes after the forward pass
    peak: int
    flops: int


class _Allocated(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        """`before`: tensors that exist already, of which views are no new bytes."""
        super().__init__()
        self.live = self.peak = 0
        self._known = {each.untyped_storage()._cdata: 0 for each in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) not in self._known:
            self._known[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)


def _forward(model: nn.Module, rows: Sequence[PackRow], device: torch.device, *, grad: bool = True) -> _Pass:
    batch = pack(rows, share=True).to(device)
    counter = FlopCounterMode(display=False)
    allocated = _Allocated([*model.parameters(), *model.buffers(), batch.ids, batch.positions])
    with torch.set_grad_enabled(grad), counter, allocated:
        hidden = hidden_states(bare(model), batch)
        found = _Pass(allocated.live, allocated.peak, counter.get_total_flops())
    assert len(hidden) == len(batch.ids)
    return found


def _row(prompt: int, completion: int) -> PackRow:
    return np.zeros(prompt, np.int32), Completion(np.zeros(completion, np.int32), np.ones(completion, bool))


def _replace_tensors(model: nn.Module, device: torch.device) -> None:
    """Replace parameters and buffers by ones without storage that claim to be on `device`; tied ones stay tied."""
    new: dict[int, Tensor] = {}

    def of_shape(old: Tensor) -> Tensor:
        if id(old) not in new:
            empty = torch.empty(old.shape, dtype=old.dtype, device=device)
            new[id(old)] = nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
        return new[id(old)]

    for module in model.modules():
        parts: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in parts:
            tensors.update({name: of_shape(old) for name, old in tensors.items() if old is not None})
