"""What lies in a directory that is to be exported: a checkpoint, FINAL, or one adapter or model, and what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halos import confined
from halos.checkpoint import integrity, lineage, manifest, select
from halos.checkpoint.weights import SHARDED
from halos.errors import UserError
from halos.rundir import is_run


@dataclass(frozen=True, slots=True)
class SavedModel:
    """The directories of a checkpoint, of FINAL, or of one adapter or model from elsewhere."""

    path: Path
    adapter: Path | None
    model: Path | None
    sharded: Path | None = None  # a model that the ranks wrote as shards
    head: Path | None = None  # the directory of a value head, if not `path`

    @classmethod
    def at(cls, path: Path) -> SavedModel:
        """Look at `path`. Raises UserError where nothing is saved there, or a file has changed since."""
        if not path.is_dir():
            raise UserError(f"{path}: there is no such directory")
        confined.refuse_links(path / "FINAL", path)
        select.refuse_older_final(path)
        path = (path / "FINAL" if (path / "FINAL").is_dir() else path).resolve()
        if is_run(path):
            newest = next(reversed(select.checkpoints(path / "checkpoints")), None)
            instead = f"name a checkpoint, such as {newest}" if newest else "and it has saved no checkpoint"
            raise UserError(f"{path} has no FINAL yet: {instead}")
        confined.inspect(path, home=confined.root_of(path))  # what is exported may go to the hub
        faults = manifest.verify(path) if (path / manifest.NAME).exists() else []
        if faults:
            raise UserError(f"{path} is not whole: {'; '.join(str(fault) for fault in faults[:3])}")
        integrity.check(path, "export")
        adapter = next((each for each in (path / "adapter", path) if (each / "adapter_config.json").is_file()), None)
        model = next((each for each in (path / "model", path) if (each / "config.json").is_file()), None)
        if adapter is not None and adapter == model:
            raise UserError(
                f"{path} holds a whole model and an adapter side by side, and from_pretrained would load one onto the other: move"
                " adapter_config.json and adapter_model.safetensors into a directory of their own, and export one of the two"
            )
        sharded = path / SHARDED if (path / SHARDED).is_dir() else None
        if adapter is None and model is None and sharded is None:
            raise UserError(
                f"{path} holds neither an adapter nor a model: give a checkpoint, FINAL, or a directory of one of them"
            )
        return cls(path, adapter, model, sharded)

    def copy(self, file: Path, output: Path) -> None:
        """Copy one of its files unchanged into `output`."""
        if not file.is_file():
            raise UserError(f"{file} is not there: {self.path} is not whole")
        confined.copy(file, output / file.name, within=confined.root_of(self.home))

    @property
    def home(self) -> Path:
        """Where tokenizer, generation settings, value head, lineage and metrics are: the checkpoint or FINAL of which this is the
        adapter or the model, by the lineage of both, else the directory itself."""
        own, above = lineage.read(self.path), lineage.read(self.path.parent)
        is_part = self.path in (self.adapter, self.model) and above is not None and own in (None, above)
        return self.path.parent if is_part else self.path

    @property
    def tokenizer(self) -> Path:
        return self.home / "tokenizer" if (self.home / "tokenizer").is_dir() else self.home

    @property
    def lineage(self) -> dict[str, Any] | None:
        return lineage.read(self.home)
