"""FSDP2: every rank has a shard of each parameter, and a layer is all-gathered when it is called."""

import os
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from halos.distributed.strategy import Fill, Strategy
from halos.errors import UserError
from halos.logps.model import ModelWithHead, bare


class FSDP2(Strategy):
    """One parameter group per layer, and one for the rest of the model, the head included.

    Uses torch's `fully_shard` rather than accelerate's `prepare`, which shards on GPUs only, needs names of layer classes, and
    would turn a frozen bfloat16 base into float32. Its settings are those of the accelerate config (`fsdp_config`). Unless
    `fill` loads every rank's shards from a checkpoint, rank 0 has the whole model in host memory, and broadcasts it a tensor at
    a time; the other ranks' models are empty until then.
    """

    is_sharded = True
    supports_quantised = False
    parameter_layout = "rows"
    launched_as = "FSDP"
    needs_process_group = True
    name = "FSDP2"

    @classmethod
    def is_requested(cls) -> bool:
        """Without a GPU accelerate itself ignores this, and trains with DDP."""
        return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"

    @classmethod
    def check_launch(cls) -> None:
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("the accelerate config asks for FSDP 1: set fsdp_version: 2 in its fsdp_config")

    def refuse_model(self, model: nn.Module) -> None:
        if not _layers(model):
            raise UserError(f"FSDP: {type(bare(model)).__name__} has no layers to shard by; launch it with a DDP config")
        dora = any("lora_magnitude_vector" in name for name, _ in model.named_parameters())
        if dora and self._precision().param_dtype is not None:
            raise UserError(
                "peft.use_dora=true: FSDP gathers layers in bfloat16, and DoRA's magnitudes with them, which are compared with"
                " norms in float32: launch it with a DDP config, or set train.precision=float32"
            )

    def _distribute(self, module: ModelWithHead, fill: Fill | None) -> nn.Module:
        layers, accelerator, plugin = _layers(module), self.accelerator, FullyShardedDataParallelPlugin()
        assert layers, "refuse_model is called first"
        assert isinstance(plugin.cpu_offload, OffloadPolicy)
        whole = module.state_dict()
        self._require_same_tensors(module)
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
            _broadcast_weights(module, whole if accelerator.is_main_process else {})
        return module

    def _distribute_frozen(self, module: ModelWithHead, fill: Fill | None) -> nn.Module:
        return self._distribute(module, fill)

    def _precision(self) -> MixedPrecisionPolicy:
        """All-gather layers in bfloat16, which autocast would use, in half the bytes; reduce gradients in float32.

        Activations stay in autocast's dtypes, so that a sharded step equals a replicated one up to the rounding of norms. The
        rest of the model, embeddings and head, keeps float32: scores are compared.
        """
        if self.accelerator.mixed_precision != "bf16":
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def reshard(self, module: nn.Module) -> None:
        """Without a backward pass FSDP2 would keep the root's parameters gathered."""
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def forward_dtypes(self, module: nn.Module) -> dict[str, torch.dtype]:
        dtype, layers = self._precision().param_dtype, _layers(module)
        rounded = {id(parameter) for layer in layers for parameter in layer.parameters()} if dtype is not None else set()
        return {name.removeprefix("model."): dtype for name, each in module.named_parameters() if dtype and id(each) in rounded}

    def clip(self, module: nn.Module, max_norm: float | None) -> Tensor:
        norm = super().clip(module, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _layers(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if isinstance(child, GradientCheckpointingLayer)]


def _broadcast_weights(module: nn.Module, whole: dict[str, Any]) -> None:
    """Fill every rank's shards from rank 0's `whole` tensors."""
    set_model_state_dict(module, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
