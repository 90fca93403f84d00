"""DeepSpeed ZeRO: stages 1 and 2 shard the optimizer state, stage 3 the parameters too."""

from collections.abc import Callable, Set
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from halos.distributed import deepspeed_config
from halos.distributed.deepspeed_config import deepspeed_requested, zero_stage
from halos.distributed.strategy import Fill, MakeOptimizer, Strategy, of_model
from halos.distributed.zero import Zero, initialize, initialize_frozen
from halos.distributed.zero_weights import empty_weights, load_weights, shard
from halos.logps.hidden import backbone_of
from halos.logps.model import ActorCritic, LanguageModel, ModelWithHead, bare


class DeepSpeed(Strategy):
    """ZeRO 1 and 2. DeepSpeed's engine owns the optimizer, and clips, steps and frees the gradients in one call, in `clip`."""

    supports_quantised = False
    parameter_layout = "flat"
    optimizer_state_is_copied = True
    takes_trials = False  # its engine counts backward passes
    launched_as = "DeepSpeed"
    needs_process_group = True
    hidden_from_accelerate = ("ACCELERATE_USE_DEEPSPEED",)  # its engine has bfloat16 weights and pickled checkpoints

    @classmethod
    def is_requested(cls) -> bool:
        return deepspeed_requested()

    @classmethod
    def check_launch(cls) -> None:
        deepspeed_config.check_config()

    @classmethod
    def requests_bfloat16(cls) -> bool:
        return deepspeed_config.bfloat16_requested()

    @property
    def name(self) -> str:
        return f"DeepSpeed ZeRO-{zero_stage()}"

    @classmethod
    def refuse_settings(cls, *, max_grad_norm: float | None, trained: str) -> None:
        deepspeed_config.refuse_settings(max_grad_norm=max_grad_norm, trained=trained)

    def wrap(
        self, module: ModelWithHead, optimizer_of: MakeOptimizer, *, max_grad_norm: float | None, fill: Fill | None = None
    ) -> tuple[nn.Module, Optimizer]:
        self._broadcast_start(module)
        self._require_same_tensors(module)
        module = self._distribute(module, fill)
        zero = initialize(
            module.to(self.accelerator.device), optimizer_of(module), max_grad_norm=max_grad_norm, head=_head(module)
        )
        return zero, zero.optimizer

    def _distribute(self, module: ModelWithHead, fill: Fill | None) -> ModelWithHead:
        if fill is not None:
            fill(module)
        return module

    def backward(self, module: nn.Module, loss: Tensor, *, last: bool) -> None:
        _zero(module).backward(loss, last=last)

    def clip(self, module: nn.Module, max_norm: float | None) -> Tensor:
        """Clip, step unless the norm is not finite, and free the gradients: the engine does all three in one call."""
        return _zero(module).update()

    def step(self, optimizer: Optimizer) -> None:
        """Do nothing: `clip` has stepped."""

    def zero_grad(self, optimizer: Optimizer) -> None:
        """Do nothing: `clip` has freed the gradients."""

    def gathered(self, module: nn.Module, *, trained_only: bool, offload: bool = True) -> dict[str, Tensor]:
        return super().gathered(_zero(module).module, trained_only=trained_only, offload=offload)

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        return _zero(module).optimizer_state()

    def load_optimizer(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        refuse_others: Callable[[Set[str]], None],
        read: Callable[[dict[str, Tensor]], None],
    ) -> None:
        zero = _zero(module)
        refuse_others(zero.settings().keys())
        for part in zero.empty_optimizer_state():
            read(part)
            zero.load_optimizer_state(part)


class DeepSpeed3(DeepSpeed):
    """ZeRO 3: parameters are sharded too."""

    is_sharded = True
    shards_are_copied = True
    can_compile = False  # its hooks gather the parameters of each module

    @classmethod
    def is_requested(cls) -> bool:
        return deepspeed_requested() and zero_stage() == 3

    def _distribute(self, module: ModelWithHead, fill: Fill | None) -> ModelWithHead:
        shard(module)
        if fill is not None:
            fill(module)
        return module

    def _distribute_frozen(self, module: ModelWithHead, fill: Fill | None) -> nn.Module:
        self._require_same_tensors(module)
        return initialize_frozen(self._distribute(module, fill), head=_head(module))

    def move_frozen(self, frozen: nn.Module, module: nn.Module, weight: float) -> None:
        with _zero(frozen).released():
            super().move_frozen(frozen, module, weight)

    def gathered(self, module: nn.Module, *, trained_only: bool, offload: bool = True) -> dict[str, Tensor]:
        return of_model(_zero(module).gathered(trained_only=trained_only, offload=offload))

    def shards(self, module: nn.Module) -> dict[str, Any]:
        """Return whole tensors, each on one rank."""
        return of_model(_zero(module).whole_tensors())

    def load_weights(self, module: nn.Module, read: Callable[[dict[str, Any]], None]) -> None:
        for part in empty_weights(module):
            read(of_model(part))
            load_weights(module, part)


def _zero(module: nn.Module) -> Zero:
    assert isinstance(module, Zero), "`wrap` returned the module"
    return module


def _head(module: nn.Module) -> nn.Module | None:
    """Return the part of a language model that is called once per chunk of scored tokens: its last layer, or all above its
    backbone."""
    if not isinstance(module, LanguageModel | ActorCritic):
        return None
    inner = bare(module.model)
    if module.plan.head == "layer":
        layer = inner.get_output_embeddings()
        assert isinstance(layer, nn.Module), "the plan uses it"
        return layer
    backbone = backbone_of(inner) if module.plan.head == "own" else inner
    return nn.ModuleList(part for part in inner.children() if part is not backbone)
