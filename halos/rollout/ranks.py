"""The processes of a stage: one, or as many as a launcher has started, each with its share of the work."""

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
        """Without a launcher nothing of torch's is touched, so that stages which need no model start at once."""
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

    def gather(self, mine: Any) -> list[Any]:
        """Every process's, in their order; a barrier too."""
        if self.world == 1:
            return [mine]
        from accelerate.utils import gather_object

        return gather_object([mine])

    def first(self, mine: Any) -> Any:
        """What the first process has."""
        return self.gather(mine)[0]

    def wait(self) -> None:
        """Until every process is here."""
        self.gather(None)


def device_of_this_process() -> Any:
    """A GPU of its own where there is one, else the CPU."""
    import torch

    from halos.distributed.device import prepare_torch, uses_gpu

    prepare_torch()
    if not uses_gpu():
        return torch.device("cpu")
    return torch.device("cuda", count_from_environment("LOCAL_RANK", 0) % torch.cuda.device_count())
