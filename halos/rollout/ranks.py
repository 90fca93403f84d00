"""The ranks of a sampling or labelling stage: one process, or as many as a launcher started, each with a shard of the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from halos.distributed.environment import count_from_environment, world_size


@dataclass(frozen=True, slots=True)
class Ranks:
    rank: int
    world: int

    @classmethod
    def of_stage(cls) -> Ranks:
        """The ranks of this process. Without a launcher torch is not imported, so that stages without a model start at once."""
        if world_size() == 1:
            return cls(count_from_environment("RANK", 0), 1)
        from accelerate import Accelerator

        from halos.distributed.device import prepare_torch, uses_gpu
        from halos.distributed.rendezvous import form_process_group

        prepare_torch()
        form_process_group()
        accelerator = Accelerator(cpu=not uses_gpu())
        return cls(accelerator.process_index, accelerator.num_processes)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order; also a barrier."""
        if self.world == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.gather(value)[0]

    def barrier(self) -> None:
        self.gather(None)


def local_device() -> Any:
    """This rank's GPU, or the CPU where there is none."""
    import torch

    from halos.distributed.device import prepare_torch, uses_gpu

    prepare_torch()
    if not uses_gpu():
        return torch.device("cpu")
    return torch.device("cuda", count_from_environment("LOCAL_RANK", 0) % torch.cuda.device_count())
