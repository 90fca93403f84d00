"""DeepSpeed's ZeRO: stages 1 and 2 share out the optimizer's state, stage 3 the parameters too."""

from collections.abc import Callable, Set
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from halos.distributed import deepspeed_config
from halos.distributed.deepspeed_config import deepspeed_asked, stage_asked
from halos.distributed.strategy import Fill, MakeOptimizer, Strategy, of_model
from halos.distributed.zero import Zero, blanks_of, cut, engage, engage_frozen, put_weights
from halos.logps.hidden import backbone_of
from halos.logps.model import ActorCritic, LanguageModel, Reader, bare


class DeepSpeed(Strategy):
    """ZeRO 1 and 2. The engine keeps the optimizer, clips, steps and forgets the gradients, all in `clip`."""

    takes_quantised = False
    optimizer_meets = "flat"
    optimizer_state_is_copied = True

    @classmethod
    def is_asked(cls) -> bool:
        return deepspeed_asked()

    @property
    def name(self) -> str:
        return f"DeepSpeed ZeRO-{stage_asked()}"

    @classmethod
    def refuse_settings(cls, *, max_grad_norm: float | None, trained: str) -> None:
        deepspeed_config.refuse_settings(max_grad_norm=max_grad_norm, trained=trained)

    def wrap(
        self, module: Reader, optimizer_of: MakeOptimizer, *, max_grad_norm: float | None, fill: Fill | None = None
    ) -> tuple[nn.Module, Optimizer]:
        self._share_start(module)
        self._agree_on_tensors(module)
        module = self._hold(module, fill)
        engaged = engage(
            module.to(self.accelerator.device), optimizer_of(module), max_grad_norm=max_grad_norm, head=_head(module)
        )
        return engaged, engaged.optimizer

    def _hold(self, module: Reader, fill: Fill | None) -> Reader:
        if fill is not None:
            fill(module)
        return module

    def backward(self, module: nn.Module, loss: Tensor, *, last: bool) -> None:
        _engaged(module).backward(loss, last=last)

    def clip(self, module: nn.Module, most: float | None) -> Tensor:
        """And step, unless the norm is not finite: the engine does all three at once."""
        return _engaged(module).update()

    def step(self, optimizer: Optimizer) -> None:
        """The engine has."""

    def forget(self, optimizer: Optimizer) -> None:
        """The engine has."""

    def gathered(self, module: nn.Module, *, trained_only: bool, offload: bool = True) -> dict[str, Tensor]:
        return super().gathered(_engaged(module).module, trained_only=trained_only, offload=offload)

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        return _engaged(module).optimizer_state()

    def load_optimizer(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        refuse_others: Callable[[Set[str]], None],
        read: Callable[[dict[str, Tensor]], None],
    ) -> None:
        engaged = _engaged(module)
        refuse_others(engaged.settings().keys())
        for part in engaged.blanks():
            read(part)
            engaged.put(part)


class DeepSpeed3(DeepSpeed):
    """ZeRO 3."""

    is_sharded = True
    shards_are_copied = True

    @classmethod
    def is_asked(cls) -> bool:
        return deepspeed_asked() and stage_asked() == 3

    def _hold(self, module: Reader, fill: Fill | None) -> Reader:
        cut(module)
        if fill is not None:
            fill(module)
        return module

    def _hold_frozen(self, module: Reader) -> nn.Module:
        self._agree_on_tensors(module)
        cut(module)
        return engage_frozen(module, head=_head(module))

    def gathered(self, module: nn.Module, *, trained_only: bool, offload: bool = True) -> dict[str, Tensor]:
        return of_model(_engaged(module).gathered(trained_only=trained_only, offload=offload))

    def shards(self, module: nn.Module) -> dict[str, Any]:
        """Each tensor whole, on one process."""
        return of_model(_engaged(module).shares())

    def load_weights(self, module: nn.Module, read: Callable[[dict[str, Any]], None]) -> None:
        for part in blanks_of(module):
            read(of_model(part))
            put_weights(module, part)


def _engaged(module: nn.Module) -> Zero:
    assert isinstance(module, Zero), "what `wrap` gave"
    return module


def _head(module: nn.Module) -> nn.Module | None:
    """What of a language model is called as often as its scored tokens need: its last layer, or all above its backbone."""
    if not isinstance(module, LanguageModel | ActorCritic):
        return None
    inner = bare(module.model)
    if module.plan.head == "layer":
        layer = inner.get_output_embeddings()
        assert isinstance(layer, nn.Module), "the plan has used it"
        return layer
    backbone = backbone_of(inner) if module.plan.head == "own" else inner
    return nn.ModuleList(part for part in inner.children() if part is not backbone)
