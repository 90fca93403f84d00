"""A rank, for tests of resuming: train runs to the end, or resume copies of them, and record hashes of their state.

torchrun tests/launch/exactness.py train OUTPUT NAME=OVERRIDES ...     OUTPUT/NAME becomes a run, OUTPUT/NAME.json its story
torchrun tests/launch/exactness.py resume OUTPUT NAME ...              goes on with OUTPUT/NAME
"""

import hashlib
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from halos.config import validate
from halos.config.run_config import compose_for_resume, load
from halos.distributed.children import exit_process
from halos.distributed.launch import make_accelerator
from halos.distributed.parameters import num_elements
from halos.distributed.zero import Zero
from halos.hooks.base import Hook, Run
from halos.run.assemble import assemble
from halos.trainers.base import Trainer
from tests.composed import config_of

ROOT = Path(__file__).resolve().parents[2]
torch.set_num_threads(1)


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def state_of(run: Run, parameter: nn.Parameter) -> Mapping[str, Any]:
    """What the optimizer keeps of a parameter, whole where DeepSpeed has it."""
    if not isinstance(run.module, Zero):
        return run.optimizer.state.get(parameter, {})
    if not parameter.requires_grad:
        return {}
    from deepspeed.utils import safe_get_full_optimizer_state

    wide, scalar = run.module._state_names()
    once = run.module.optimizer.optimizer.state[run.module._partitions()[0][1]]
    return {key: safe_get_full_optimizer_state(parameter, key) for key in wide} | {key: once[key] for key in scalar}


def digest(parts: Any) -> str:
    told = hashlib.sha256()
    for part in parts:
        told.update(
            part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            if isinstance(part, Tensor)
            else repr(part).encode()
        )
    return told.hexdigest()[:16]


def fingerprint(run: Run) -> dict[str, str]:
    """Hashes of all that the next step depends on; a parameter's is of its whole value, a generator's of every rank's."""
    parameters = dict(run.module.named_parameters())
    if isinstance(run.module, Zero) and run.module.stage == 3:
        gathered = run.module.gathered(trained_only=False, offload=False)
        values = [gathered[name.removeprefix("module.")] for name in parameters]
    else:
        values = [whole(p) for p in parameters.values()]
    gradients = [whole(p.grad) for p in parameters.values() if p.grad is not None]
    state = [value for p in parameters.values() for _, value in sorted(state_of(run, p).items())]
    moments = [whole(value) if isinstance(value, Tensor) else value for value in state]
    mine = digest([random.getstate(), *np.random.get_state()[1:3], torch.get_rng_state()])  # type: ignore[index]
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    return {
        "parameters": digest(values),
        "gradients": digest(gradients),
        "optimizer": digest(moments),
        "random": digest(everyone),
    }


class Witness(Hook):
    """What a run was at its start, before and after every save; the losses and the items of every step."""

    def __init__(self) -> None:
        self.story: dict[str, Any] = {"saves": {}, "before": {}, "losses": [], "batches": {}}

    def on_start(self, run: Run) -> None:
        self.story["start"] = fingerprint(run)
        trained = [p for p in run.module.parameters() if p.requires_grad]
        self.story["trained bytes"] = sum(num_elements(p) * p.element_size() for p in trained)

    def on_step(self, run: Run, metrics: Mapping[str, Any]) -> None:
        self.story["losses"].append(["train", run.step, metrics["loss"]])

    def on_eval(self, run: Run, metrics: Mapping[str, Any]) -> None:
        self.story["losses"].append(["eval", run.step, metrics["loss"]])

    def on_save(self, run: Run, path: Path, *, final: bool) -> None:
        self.story["before"]["final" if final else str(run.step)] = fingerprint(run)


def watch(trainer: Trainer) -> Witness:
    witness, step, save = Witness(), trainer.step, trainer.checkpointer.save
    trainer.run.hooks = {"witness": witness, **trainer.run.hooks}

    def noted(indices: np.ndarray) -> Any:
        witness.story["batches"][str(trainer.run.step)] = indices.tolist()
        return step(indices)

    def saved(*, final: bool) -> None:
        save(final=final)
        witness.story["saves"]["final" if final else str(trainer.run.step)] = fingerprint(trainer.run)

    trainer.step, trainer.checkpointer.save = noted, saved  # type: ignore[method-assign]
    return witness


def main() -> None:
    mode, output, *cells = sys.argv[1:]
    for cell in cells:
        name, _, overrides = cell.partition("=")
        run = f"{output}/{name}"
        if mode == "train":
            words = [*overrides.split(), f"exp_name={name}", f"output_root={output}"]
            config = config_of(*words)
        else:
            settings = load(Path(run, "config.yaml").read_text(), {}, run)
            config = validate.check(compose_for_resume(settings, run, run), [])
        trainer = assemble(config, [], make_accelerator(config.train.precision, config.model.dtype))
        assert trainer is not None
        witness = watch(trainer)
        trainer.fit()
        witness.story["ahead"] = [trainer.order.batch(trainer.run.step + k).tolist() for k in range(10)]
        if trainer.run.main:
            Path(f"{run}.json").write_text(json.dumps(witness.story))
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
    exit_process(0)
