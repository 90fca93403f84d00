"""Consolidate a sharded checkpoint into one model that from_pretrained loads."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from halos.checkpoint import sharded
from halos.checkpoint.weights import save_model, split_value_head
from halos.errors import UserError, user_errors
from halos.logps.vocabulary import Vocabulary
from halos.merge.merge_and_prove import case_of
from halos.merge.safetensors_io import SHARD, Entry, weight_files, write_sharded
from halos.reward_kind import RewardKind

MAX_ELEMENTS = 2**28  # in memory at once; a larger tensor is read by itself


@contextmanager
def consolidated(directory: Path, parent: Path, *, reward: RewardKind | None) -> Iterator[Path]:
    """Yield a temporary directory in `parent` with model/ and, if there is one, value_head/.

    Shards are joined a few tensors at a time; transformers then writes them from mapped memory, under the names of its files.
    Raises UserError where they are not the tensors of the architecture that config.json names.
    """
    with (
        tempfile.TemporaryDirectory(dir=parent, prefix=".consolidate-") as name,
        user_errors(f"{directory} cannot be consolidated"),
    ):
        raw, root = Path(name) / "raw", Path(name)
        raw.mkdir()
        reader = _Reader(directory)
        entries = {
            name: Entry(dtype, list(shape), partial(reader.blocks, name)) for name, (shape, dtype) in reader.shapes.items()
        }
        write_sharded(raw, entries, SHARD)
        state = {name: value for file in weight_files(raw) for name, value in load_file(file).items()}
        _save(root, directory, split_value_head(root, state), reward)
        shutil.rmtree(raw)
        for file in ("config.json", "generation_config.json"):
            if (directory / file).is_file():
                shutil.copy(directory / file, root / "model" / file)
        yield root


def _save(root: Path, directory: Path, state: dict[str, Tensor], reward: RewardKind | None) -> None:
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    model = case_of(directory, directory, Vocabulary(), dtype=dtype, reward=reward).empty_model()
    names: dict[int, str] = {}
    for name, value in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        first = names.setdefault(id(value), name)
        if name not in state and first in state:
            state[name] = state[first]  # tied, and saved once
    own = model.state_dict()
    if wrong := sorted(name for name in state.keys() | own.keys() if name not in state or name not in own):
        raise UserError(f"{directory} is not whole, or of another architecture than its config.json says: {wrong[0]}")
    if other := [name for name in own if own[name].shape != state[name].shape]:
        raise UserError(f"{directory} is not whole, or of another shape than its config.json says: {other[0]}")
    save_model(root / "model", model, state)


class _Reader:
    """Reads the tensors of a sharded checkpoint unsharded, in order of their names, as many at a time as memory may hold."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.shapes = directory, dict(sorted(sharded.shapes(directory).items()))
        self._read: dict[str, Tensor] = {}

    def blocks(self, name: str) -> Iterator[Tensor]:
        if name not in self._read:
            self._read = {}
            self._read = self._empty_from(name)
            sharded.read(self.directory, self._read)
        yield self._read[name]

    def _empty_from(self, name: str) -> dict[str, Tensor]:
        """Return uninitialised tensors for `name` and as many after it as fit."""
        names, size, tensors = list(self.shapes), 0, dict[str, Tensor]()
        for each in names[names.index(name) :]:
            shape, dtype = self.shapes[each]
            size += shape.numel()
            if tensors and size > MAX_ELEMENTS:
                break
            tensors[each] = torch.empty(shape, dtype=dtype)
        return tensors
