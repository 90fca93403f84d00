"""The strategy without sharding: every rank has the whole model, one process alone or several under DDP."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from halos.distributed.strategy import Fill, Strategy
from halos.errors import UserError
from halos.logps.model import ModelWithHead


class Replicated(Strategy):
    """A single process, or DDP."""

    @classmethod
    def is_requested(cls) -> bool:
        """Always: it is the last strategy to be asked."""
        return True

    @property
    def name(self) -> str:
        return "DDP" if self.accelerator.num_processes > 1 else "alone"

    def _distribute(self, module: ModelWithHead, fill: Fill | None) -> nn.Module:
        if fill is not None:
            fill(module)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # accelerate knows no other name yet
            prepared = self.accelerator.prepare(module)
        if self.accelerator.num_processes > 1 and not isinstance(prepared, DistributedDataParallel):
            raise UserError(
                f"{self.accelerator.num_processes} processes were launched, and accelerate gave a {type(prepared).__name__}:"
                " gradients would not be shared. Use one of launch/accelerate/*.yaml"
            )
        return prepared

    def accumulate(self, module: nn.Module) -> AbstractContextManager[Any]:
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()
