"""A checkpoint of which each process wrote its own part, as the one model that from_pretrained loads."""

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
from halos.checkpoint.weights import apart, save_model
from halos.errors import UserError, doing
from halos.logps.vocabulary import Vocabulary
from halos.merge.merge_and_prove import case_of
from halos.merge.safetensors_io import SHARD, Entry, weight_files, write_sharded

AT_ONCE = 2**28  # elements in memory, or one tensor


@contextmanager
def consolidated(directory: Path, beside: Path, *, reward: bool) -> Iterator[Path]:
    """A directory with model/, and value_head/ where there is one, on the disk of `beside`, for as long as it is wanted.

    Shards are put together a few tensors at a time; transformers then writes them as its files hold them, from mapped memory.
    Raises UserError where they are not the tensors of the architecture that config.json names.
    """
    with tempfile.TemporaryDirectory(dir=beside, prefix=".consolidate-") as place, doing(f"{directory} cannot be consolidated"):
        raw, root = Path(place) / "raw", Path(place)
        raw.mkdir()
        parts = _Parts(directory)
        entries = {name: Entry(kind, list(shape), partial(parts.blocks, name)) for name, (shape, kind) in parts.facts.items()}
        write_sharded(raw, entries, SHARD)
        state = {name: value for file in weight_files(raw) for name, value in load_file(file).items()}
        _save(root, directory, apart(root, state), reward)
        shutil.rmtree(raw)
        for name in ("config.json", "generation_config.json"):
            if (directory / name).is_file():
                shutil.copy(directory / name, root / "model" / name)
        yield root


def _save(root: Path, directory: Path, state: dict[str, Tensor], reward: bool) -> None:
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    model = case_of(directory, directory, Vocabulary(), dtype=dtype, reward=reward).bare()
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


class _Parts:
    """Whole tensors of a sharded directory in its order, read as many at a time as may be in memory."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.facts = directory, dict(sorted(sharded.shapes(directory).items()))
        self._held: dict[str, Tensor] = {}

    def blocks(self, name: str) -> Iterator[Tensor]:
        if name not in self._held:
            self._held = {}
            self._held = self._from(name)
            sharded.read(self.directory, self._held)
        yield self._held[name]

    def _from(self, name: str) -> dict[str, Tensor]:
        """Empty tensors, of this one and those behind it."""
        names, size, found = list(self.facts), 0, dict[str, Tensor]()
        for each in names[names.index(name) :]:
            shape, dtype = self.facts[each]
            size += shape.numel()
            if found and size > AT_ONCE:
                break
            found[each] = torch.empty(shape, dtype=dtype)
        return found
