"""FSDP2: every process has a shard of each parameter, and a layer is gathered where it is called."""

from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from halos.distributed.launch import asked_to_shard
from halos.distributed.strategy import Fill, Strategy
from halos.errors import UserError
from halos.logps.model import Reader, bare


class FSDP2(Strategy):
    """A group of parameters for each layer of the model, and one for the rest, the head included.

    torch's own engine rather than accelerate's `prepare`, which shards on GPUs only, wants names of layer classes, and
    would turn a frozen bfloat16 base into float32. The accelerate config still says how (`fsdp_config`). The first process
    has the whole model in its host's memory, and deals it out a tensor at a time; the others' are hollow until then.
    """

    is_sharded = True
    takes_quantised = False
    optimizer_meets = "rows"
    name = "FSDP2"

    @classmethod
    def is_asked(cls) -> bool:
        return asked_to_shard()

    def refuse_model(self, model: nn.Module) -> None:
        if not _layers(model):
            raise UserError(f"FSDP: {type(bare(model)).__name__} has no layers to shard by; launch it with a DDP config")

    def _hold(self, module: Reader, fill: Fill | None) -> nn.Module:
        layers, accelerator, plugin = _layers(module), self.accelerator, FullyShardedDataParallelPlugin()
        assert layers, "refuse_model came before"
        assert isinstance(plugin.cpu_offload, OffloadPolicy)
        whole = module.state_dict()
        self._agree_on_tensors(module)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for part in (*layers, module):
            fully_shard(
                part,
                mesh=mesh,
                reshard_after_forward=bool(plugin.reshard_after_forward),
                offload_policy=plugin.cpu_offload,
                mp_policy=self._precision() if part is not module else MixedPrecisionPolicy(),
            )
        if fill is not None:
            fill(module)
        elif accelerator.num_processes > 1:
            _deal_out(module, whole if accelerator.is_main_process else {})
        return module

    def _hold_frozen(self, module: Reader) -> nn.Module:
        return self._hold(module, None)

    def _precision(self) -> MixedPrecisionPolicy:
        """Layers gather their parameters as autocast would use them, in half the bytes; gradients are summed in float32.

        Activations stay what autocast makes of them, so that a sharded step is a replicated one up to the rounding of norms.
        The rest of the model, embeddings and head, keeps float32: scores are compared.
        """
        if self.accelerator.mixed_precision != "bf16":
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def reshard(self, module: nn.Module) -> None:
        """Without a backward the root's parameters stay whole."""
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def clip(self, module: nn.Module, most: float | None) -> Tensor:
        norm = super().clip(module, most)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _layers(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if isinstance(child, GradientCheckpointingLayer)]


def _deal_out(module: nn.Module, whole: dict[str, Any]) -> None:
    """The first process's `whole` tensors become every process's shards."""
    set_model_state_dict(module, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
