"""A reference that follows the policy: every few steps it becomes the policy, or moves towards it.

TR-DPO (arXiv:2404.09656) and humanline (arXiv:2509.24207). It moves after the backward pass of a step and before its update: so
with `every=1` the log-ratios of a step are those of one update. After the update all of them would be 0.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from halos.distributed.parameters import move
from halos.distributed.strategy import Strategy
from halos.logps.model import ModelWithHead


class MovingReference:
    """The reference of a policy whose start it was. Every rank calls every method.

    `frozen` is its model; None where the policy, with other values of its adapter, is the reference: every rank has them whole.
    `has_moved`: it is no longer the start, and has to be saved.
    """

    def __init__(
        self, strategy: Strategy, module: nn.Module, frozen: nn.Module | None, *, every: int, weight: float, has_moved: bool
    ) -> None:
        self.every, self.weight, self.has_moved = every, weight, has_moved
        self._strategy, self._module, self._frozen = strategy, module, frozen
        self._own = next(part for part in module.modules() if isinstance(part, ModelWithHead))

    def before_update(self, step: int) -> None:
        """Move, where that is due at `step`, counted from 1."""
        if step % self.every:
            return
        self.has_moved = True
        if self._frozen is not None:
            self._strategy.move_frozen(self._frozen, self._module, self.weight)
            return
        for name, value in self._trained().items():
            move(self._own.reference_values[name], value, self.weight)

    @property
    def tensors_are_copied(self) -> bool:
        """Whether `tensors` returns copies."""
        return self._frozen is not None and self._strategy.shards_are_copied

    def tensors(self) -> Mapping[str, Tensor]:
        """What this rank writes into a checkpoint: shards, or whole tensors that it writes for all ranks."""
        if self._frozen is not None and self._strategy.is_sharded:
            return self._strategy.shards(self._frozen)
        if not self._strategy.accelerator.is_main_process:
            return {}
        return self._strategy.shards(self._frozen) if self._frozen is not None else self._own.reference_values

    def _trained(self) -> Mapping[str, Tensor]:
        """The policy's values, whole, of what the reference has values of its own of."""
        names = self._own.reference_values
        if not self._strategy.is_sharded:
            return {name: self._own.get_parameter(name) for name in names}
        whole = self._strategy.gathered(self._module, trained_only=True, offload=False)
        return {name: whole[name.removeprefix("model.")] for name in names}
