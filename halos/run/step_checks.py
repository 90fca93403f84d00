"""Refuse keys that change how a step computes where they would do nothing, or could not."""

from accelerate import Accelerator
from torch import nn

from halos.config.schema import Train
from halos.distributed.strategy import Strategy
from halos.errors import UserError
from halos.logps.compiled import regions_of
from halos.logps.model import bare


def refuse_unfit(train: Train, model: nn.Module, strategy: Strategy, accelerator: Accelerator) -> None:
    """Raises UserError for train.compile or train.working_weights."""
    if train.compile:
        _refuse_uncompilable(model, strategy)
    if train.working_weights == "step":
        _refuse_without_casts(strategy, accelerator)


def _refuse_uncompilable(model: nn.Module, strategy: Strategy) -> None:
    if not strategy.can_compile:
        raise UserError(
            f"train.compile=true: {strategy.name} gathers the parameters of each module when it is called, so that modules cannot"
            " be compiled together: leave it out, or use FSDP"
        )
    if not regions_of(model):
        name = type(bare(model)).__name__
        raise UserError(f"train.compile=true: {name} has no norm or feed-forward network without trained vectors: leave it out")


def _refuse_without_casts(strategy: Strategy, accelerator: Accelerator) -> None:
    if strategy.is_sharded:
        raise UserError(
            f"train.working_weights=step: {strategy.name} gathers the parameters of each layer, and copies would stay longer:"
            " leave it out"
        )
    if accelerator.mixed_precision != "bf16":
        raise UserError(
            "train.working_weights=step: nothing is cast where the run computes in float32: leave it out, or set"
            " train.precision=bfloat16"
        )
