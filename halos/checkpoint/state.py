"""The training state besides weights: optimizer, random number generators, position in the data, hooks.

Tensors are safetensors, written and read through torch.distributed.checkpoint so that they load across strategies and
world sizes; the rest is JSON. Nothing is pickled: a checkpoint from a stranger cannot run code.
"""

import json
import random
from collections.abc import Mapping, Set
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from halos import confined
from halos.checkpoint import select, sharded
from halos.distributed.device import uses_gpu
from halos.distributed.strategy import Strategy
from halos.errors import UserError, user_errors
from halos.hooks.base import Run, states_of


def save_optimizer(directory: Path, flat: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Each rank of `group` writes its shards of a strategy's `optimizer_state`; rank 0 writes the settings as JSON."""
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    settings = {name: value for name, value in flat.items() if not isinstance(value, Tensor)}
    sharded.write(directory / "optimizer", tensors, group)
    if not dist.is_initialized() or dist.get_rank() == 0:
        (directory / "optimizer.json").write_text(json.dumps(settings, indent=1))


def load_optimizer(directory: Path, strategy: Strategy, module: nn.Module, optimizer: Optimizer) -> None:
    """Load a saved state into an optimizer over the same parameters. Raises UserError where its parameters are others."""
    saved = confined.load_object(directory / "optimizer.json").keys()
    read = partial(sharded.read, directory / "optimizer")
    strategy.load_optimizer(module, optimizer, refuse_others=partial(_refuse_others, directory, saved), read=read)


def save_reference(directory: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Each rank of `group` writes its `MovingReference.tensors`."""
    sharded.write(directory / "reference", tensors, group)


def saved_reference(checkpoint: Path | None) -> Path | None:
    """Return the directory of a checkpoint's reference; None where it is that of the run's start."""
    directory = checkpoint / "state" / "reference" if checkpoint is not None else None
    return directory if directory is not None and directory.is_dir() else None


def load_reference_values(directory: Path, values: Mapping[str, Tensor]) -> None:
    """Load a saved reference into whole `values`. Raises UserError where it is that of another adapter."""
    with user_errors(f"{directory} cannot be read"):
        if (shapes := {name: shape for name, (shape, _) in sharded.shapes(directory).items()}) != {
            name: value.shape for name, value in values.items()
        }:
            raise UserError(f"{directory} is not the reference of this adapter: it has {len(shapes)} tensors of {len(values)}")
        sharded.read(directory, values)


def _refuse_others(directory: Path, saved: Set[str], mine: Set[str]) -> None:
    if other := sorted(saved ^ mine):
        raise UserError(f"{directory} holds the optimizer of other parameters: {other[0]} is on one side only")


def random_state() -> dict[str, Tensor]:
    """Return the states of Python's, numpy's and torch's generators as tensors."""
    version, integers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "python": torch.tensor([version, *integers], dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if uses_gpu():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    version, *integers = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((version, tuple(integers), None if gauss != gauss else gauss))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and uses_gpu():
        torch.cuda.set_rng_state(state["cuda"])


def save_random(directory: Path, state: dict[str, Tensor], rank: int) -> None:
    save_file(state, directory / f"random-{rank:05d}.safetensors")


def load_random(directory: Path, rank: int) -> None:
    """Restore this rank's generators; a rank that did not exist at the save keeps those that its seed set."""
    path = directory / f"random-{rank:05d}.safetensors"
    if path.exists():
        restore_random_state(load_file(path))


PROGRESS: dict[str, type] = {
    "step": int, "examples": int, "tokens": int, "last_eval": dict, "last_train": dict, "window": dict, "hooks": dict,
}  # fmt: skip


def load_progress(directory: Path, step: int) -> dict[str, Any]:
    """Return progress.json of the checkpoint of `step`. Raises UserError where no save at that step could have written it."""
    path = directory / "progress.json"
    progress = confined.load_object(path, within=directory)
    later = {"bad_steps": int, "skipped_steps": int, "finite_at": int, "reference": dict}  # than the first version
    known = {name: kind for name, kind in later.items() if name in progress}
    if wrong := [name for name, kind in {**PROGRESS, **known}.items() if type(progress.get(name)) is not kind]:
        raise UserError(f"{path} is not what a save writes: its {wrong[0]} is missing or of another type")
    if progress["step"] != step:
        raise UserError(f"{path} is of step {progress['step']}, and lies in a checkpoint of step {step}")
    if not all(_is_total(total) for total in progress["window"].values()):
        raise UserError(f"{path} is not what a save writes: its window holds no sums and counts")
    return progress


def progress_of(run: Run) -> dict[str, Any]:
    """Return the part of a run's state that is not tensors. Raises UserError for a hook's state that JSON does not keep."""
    return {
        "step": run.step,
        "examples": run.examples,
        "tokens": run.tokens,
        "last_eval": run.last_eval,
        "last_train": run.last_train,
        "window": run.window.totals,
        "bad_steps": run.bad_steps,
        "skipped_steps": run.skipped_steps,
        "finite_at": run.finite_at,
        "reference": run.reference,
        "world_size": run.accelerator.num_processes,
        "hooks": states_of(run.hooks),
    }


def restore(run: Run, checkpoint: Path) -> None:
    """Restore optimizer, random numbers, position and hooks; the weights were loaded with the model."""
    directory = checkpoint / "state"
    progress = load_progress(directory, select.step_of(checkpoint))
    with user_errors(f"{directory} cannot be restored", f"resume from another checkpoint, resume={checkpoint.parent}/step-N"):
        load_optimizer(directory, run.strategy, run.module, run.optimizer)
        load_random(directory, run.accelerator.process_index)
        for name, hook in run.hooks.items():
            if name in progress["hooks"]:  # a hook that the saved run did not have starts anew
                hook.load_state_dict(progress["hooks"][name])
    run.step, run.examples, run.tokens = progress["step"], progress["examples"], progress["tokens"]
    run.last_eval, run.last_train = progress["last_eval"], progress["last_train"]
    run.window.totals = progress["window"]
    run.bad_steps, run.skipped_steps = progress.get("bad_steps", 0), progress.get("skipped_steps", 0)
    run.finite_at = progress.get("finite_at", -1)
    run.reference = {str(name): str(value) for name, value in progress.get("reference", {}).items()}


def _is_total(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, (int, float)) for part in value)
