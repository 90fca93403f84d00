"""A rank that trains cells one after the other and saves gradients, losses and the order of the data.

torchrun tests/launch/worker.py OUTPUT STEPS CELL [CELL ...], a cell being overrides joined with blanks.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from halos.distributed.children import exit_process
from halos.distributed.launch import make_accelerator
from halos.distributed.parameters import shape_of, zero3_shard_of
from halos.distributed.zero import Zero
from halos.logps import head
from halos.run.assemble import assemble
from halos.trainers.base import Trainer
from halos.types import Loss
from tests.composed import config_of

ROOT = Path(__file__).resolve().parents[2]
torch.set_num_threads(1)
head.LOGITS_AT_ONCE = 2000  # some tokens at a time, so that processes call the head different numbers of times


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): p for name, p in module.named_parameters() if p.requires_grad}


def unsettle(module: nn.Module) -> None:
    """Away from policy == reference, where losses have no curvature and z0 is 0; the same way on every strategy."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(trained(module).items()):
            noise = 0.02 * torch.randn(shape_of(parameter), generator=generator)
            if isinstance(module, Zero):
                add_to(parameter, noise)
                continue
            sharded = isinstance(parameter, DTensor)
            parameter += distribute_tensor(noise, parameter.device_mesh, parameter.placements) if sharded else noise
    if isinstance(module, Zero) and module.stage == 3 and (kept := module.optimizer.persistent_parameters):
        kept[0].all_gather(kept)


def add_to(parameter: nn.Parameter, noise: Tensor) -> None:
    """To what the layers see, and to what DeepSpeed's optimizer has of it."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param

    moved = safe_get_full_fp32_param(parameter) + noise
    if not hasattr(parameter, "ds_id"):
        safe_set_full_fp32_param(parameter, moved)
        parameter += noise
        return
    safe_set_local_fp32_param(parameter, zero3_shard_of(parameter, moved))
    with GatheredParameters([parameter], modifier_rank=0):
        parameter += noise


def first_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Before they are clipped, so as they are when the update is made."""
    seen: dict[str, Tensor] = {}
    strategy = trainer.run.strategy
    clip = strategy.clip

    def look(module: nn.Module, max_norm: float | None) -> Tensor:
        seen.update({name: value for name, p in trained(module).items() if (value := gradient(p)) is not None})
        strategy.clip = clip  # type: ignore[method-assign]
        return clip(module, max_norm)

    strategy.clip = look  # type: ignore[method-assign]
    trainer._log(trainer.step(trainer.order.batch(0)))
    return seen


def spoiled(loss: Loss) -> Loss:
    """Not finite, and so is each part of a sum, which is what is trained on."""
    parts = {name: spoiled(part) for name, part in loss.parts.items()}
    return replace(loss, values=loss.values * float("nan"), parts=parts)


def skip_one(trainer: Trainer) -> None:
    """A step whose loss is not finite on the last process alone: all of them skip it, and the first has its rows."""
    whole, run = trainer.loss, trainer.run
    last = run.accelerator.process_index == run.accelerator.num_processes - 1

    def broken(*given: Any) -> Any:
        loss = whole.function(*given)
        return spoiled(loss) if last else loss

    trainer.loss = replace(whole, function=broken)
    indices = trainer.order.batch(run.step)
    assert trainer.step(indices) == {}
    trainer.loss = whole
    if run.main:
        rows = json.loads(run.directory.bad_rows.read_text())["rows"]
        assert [row["row"] for row in rows] == indices.tolist()
        assert {row["rank"] for row in rows if row["loss"] == "nan"} == {run.accelerator.num_processes - 1}


def gradient(parameter: nn.Parameter) -> Tensor | None:
    if hasattr(parameter, "_dp_group") or hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).detach().clone()
    return None if parameter.grad is None else whole(parameter.grad)


def main() -> None:
    output, steps, *cells = sys.argv[1:]
    for number, cell in enumerate(cells):
        words = [*cell.split(), f"train.steps={steps}", f"exp_name=cell{number}", f"output_root={output}/runs"]
        config = config_of(*words)
        trainer = assemble(config, [], make_accelerator(config.train.precision, config.model.dtype))
        assert trainer is not None
        trainer.prepare_reference()
        trainer.prepare()  # what sampled is the policy as it was; the one that learns has moved on
        unsettle(trainer.run.module)
        gradients = first_gradients(trainer)
        losses = [trainer.run.last_train["loss"]]
        skip_one(trainer)  # of which the steps to come must know nothing
        for k in range(1, int(steps)):
            trainer._log(trainer.step(trainer.order.batch(k)))
            losses.append(trainer.run.last_train["loss"])
        trainer.evaluate()
        losses.append(trainer.run.last_eval["loss"])
        if trainer.run.main:
            print(trainer.run.strategy.name)
            save_file({**gradients, "losses": torch.tensor(losses, dtype=torch.float64)}, f"{output}/{number}.safetensors")
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
    exit_process(0)
