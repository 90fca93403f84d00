"""Any save as a directory for others: merged, adapter or whole model, with tokenizer, generation settings, card and lineage."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from peft import PeftConfig
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from halos import confined
from halos.checkpoint import card, integrity, lineage, manifest, select
from halos.checkpoint.commit import HIDDEN, staged
from halos.checkpoint.weights import HEAD_FILE, SHARDED, VALUE_HEAD
from halos.confined import NO_CODE
from halos.errors import UserError, doing
from halos.export.consolidate import consolidated
from halos.logps.vocabulary import Vocabulary
from halos.merge import expected
from halos.merge.base_weights import Names
from halos.merge.merge_and_prove import case_of, combine, vocabulary_of
from halos.merge.safetensors_io import SHARD, Entry, SafeFile, blocks, weight_files, write_sharded
from halos.rundir import is_run

TEMPLATES = "additional_chat_templates"  # beside the default one: a directory of jinja files by name
WORDS = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab*", "merges.txt")
AT_REST = {torch.float64, torch.float32, torch.float16, torch.bfloat16}  # what another dtype can be made of


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint, FINAL, or a directory of one adapter or one model: where its parts lie."""

    path: Path
    adapter: Path | None
    model: Path | None
    sharded: Path | None = None  # a model of which each process wrote its part
    head: Path | None = None  # where a value head lies, if not beside the rest

    @classmethod
    def at(cls, path: Path) -> "Saved":
        """Raises UserError where nothing is saved at `path`, or not every byte of it is what it was."""
        if not path.is_dir():
            raise UserError(f"{path}: there is no such directory")
        confined.refuse_links(path / "FINAL", path)
        path = path / "FINAL" if (path / "FINAL").is_dir() else path
        if is_run(path):
            newest = next(reversed(select.checkpoints(path / "checkpoints")), None)
            instead = f"name a checkpoint, such as {newest}" if newest else "and it has saved no checkpoint"
            raise UserError(f"{path} has no FINAL yet: {instead}")
        confined.inspect(path, home=confined.root_of(path))  # what is exported may go to the hub
        faults = manifest.verify(path) if (path / manifest.NAME).exists() else []
        if faults:
            raise UserError(f"{path} is not whole: {'; '.join(str(fault) for fault in faults[:3])}")
        integrity.check(path, "export")
        adapter = next((place for place in (path / "adapter", path) if (place / "adapter_config.json").is_file()), None)
        model = next((place for place in (path / "model", path) if (place / "config.json").is_file()), None)
        if adapter is not None and adapter == model:
            raise UserError(
                f"{path} holds a whole model and an adapter side by side, and from_pretrained would put one on the other: move"
                " adapter_config.json and adapter_model.safetensors into a directory of their own, and export what is meant"
            )
        sharded = path / SHARDED if (path / SHARDED).is_dir() else None
        if adapter is None and model is None and sharded is None:
            raise UserError(
                f"{path} holds neither an adapter nor a model: give a checkpoint, FINAL, or a directory of one of them"
            )
        return cls(path, adapter, model, sharded)

    def copy(self, file: Path, place: Path) -> None:
        """One of its files, as it is."""
        if not file.is_file():
            raise UserError(f"{file} is not there: {self.path} is not whole")
        confined.copy(file, place / file.name, within=confined.root_of(self.path))

    @property
    def words(self) -> Path:
        return self.path / "tokenizer" if (self.path / "tokenizer").is_dir() else self.path

    @property
    def lineage(self) -> dict[str, Any] | None:
        return lineage.read(self.path) or (lineage.read(self.path.parent) if self.path.name == "adapter" else None)


def merged(path: Path, output: Path, *, dtype: torch.dtype | None = None, base: Path | None = None, shard: int = SHARD) -> str:
    """Merge an adapter into `output`; what was proved. `dtype` None keeps the base's; `base` says where that lies now.

    Raises UserError where there is no adapter, its base is gone or another one, the proof fails, or `output` exists.
    """
    saved = Saved.at(path)
    if saved.adapter is None:
        raise UserError(f"{path} holds no adapter: there is nothing to merge")
    if saved.model is not None and base is None and dtype in (None, _config(saved.model).dtype):
        return whole(path, output, shard=shard)  # FINAL's, merged from its base and proved at the time
    where = _base(saved, base)
    with _new(output, path) as place:
        case = case_of(where, saved.adapter, _vocabulary(saved, where), dtype=dtype)
        result = combine(case, place, lineage.hashes, shard=shard)
        if not result.holds:
            raise UserError(f"the merged model is not the adapter's: {result}. Nothing was written")
        _copy_beside(saved, place)
        if not case.reward:
            _copy_generation(where, saved, place)
        _describe(saved, place, output.name, adapter=False, reward=case.reward)
    return str(result)


def adapter(path: Path, output: Path, *, base: Path | None = None) -> str:
    """The adapter alone, in PEFT's own format, which names its base as the hub does where it came from there."""
    saved = Saved.at(path)
    if saved.adapter is None:
        raise UserError(f"{path} holds no adapter: leave out --adapter")
    if base is not None:
        _base(saved, base)
    with _new(output, path) as place:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            saved.copy(saved.adapter / file, place)
        vocabulary = Vocabulary.load(saved.adapter)
        if vocabulary is not None:
            vocabulary.save(place)
        if (saved.path / "generation_config.json").is_file():
            _copy_generation(saved.path, saved, place)
        chain, settings = saved.lineage, place / "adapter_config.json"
        name = chain["runs"][-1]["base"]["name"] if chain else ""
        if base is not None or lineage.on_the_hub(name):
            named = {"base_model_name_or_path": str(base.resolve()) if base is not None else name}
            settings.write_text(json.dumps({**confined.load_object(settings), **named}, indent=2))
        _copy_beside(saved, place)
        reward = _settings(place).task_type == "SEQ_CLS"
        _describe(saved, place, output.name, adapter=True, reward=reward)
    return "the adapter as it was saved"


def whole(path: Path, output: Path, *, dtype: torch.dtype | None = None, shard: int = SHARD) -> str:
    """A model's weights as they are, or rounded once to `dtype`."""
    saved = Saved.at(path)
    if saved.sharded is None:
        return _whole(saved, path, output, dtype=dtype, shard=shard)
    output.parent.mkdir(parents=True, exist_ok=True)
    with consolidated(saved.sharded, output.parent, reward=_is_reward(_config(saved.sharded))) as place:
        made = replace(saved, model=place / "model", head=place if (place / VALUE_HEAD).is_dir() else None)
        return _whole(made, path, output, dtype=dtype, shard=shard)


def _is_reward(config: PretrainedConfig) -> bool:
    return any("SequenceClassification" in name for name in config.architectures or [])


def _whole(saved: Saved, path: Path, output: Path, *, dtype: torch.dtype | None, shard: int) -> str:
    if saved.model is None:
        raise UserError(f"{path} holds an adapter and no whole model: merge it")
    config = _config(saved.model)
    reward = _is_reward(config)
    wide = _wide(saved.model, dtype, reward=reward) if dtype is not None else set()
    with _new(output, path) as place:
        write_sharded(place, _entries(saved.model, dtype, wide), shard)
        _, faults = expected.compare(place, expected.copy_of(saved.model, wide), dtype)
        if faults:
            raise UserError(f"what was written is not what was saved: {faults[0]}. Nothing was written")
        config.dtype = dtype or config.dtype
        config.save_pretrained(place)
        _copy_beside(saved, place)
        _copy_generation(saved.model, saved, place)
        if (saved.path / "merge_report.json").is_file() and dtype is None:
            saved.copy(saved.path / "merge_report.json", place)
        _describe(saved, place, output.name, adapter=False, reward=reward)
    return f"{'the weights as they were saved' if dtype is None else f'rounded to {dtype}'.replace('torch.', '')}"


def _config(model: Path) -> PretrainedConfig:
    with doing(f"{model}/config.json cannot be read"):
        return AutoConfig.from_pretrained(model, **NO_CODE)


def _settings(adapter: Path) -> PeftConfig:
    confined.load_object(adapter / "adapter_config.json")  # said by its name, before PEFT has words for it
    with doing(f"{adapter}/adapter_config.json is none of PEFT's"):
        return PeftConfig.from_pretrained(str(adapter))


def _wide(model: Path, dtype: torch.dtype, *, reward: bool) -> set[str]:
    """The tensors that stay float32 in a model of `dtype`, as from_pretrained has them: a router's correction bias for one."""
    names = Names(case_of(model, model, Vocabulary(), dtype=dtype, reward=reward).bare())
    mine = {name: names(name)[0] or name for file in map(SafeFile, weight_files(model)) for name in file.names}
    return {name for name in mine if names.dtype_of(mine[name], dtype) is not dtype}


def _entries(model: Path, dtype: torch.dtype | None, wide: Collection[str]) -> dict[str, Entry]:
    found = {}
    for file in map(SafeFile, weight_files(model)):
        for name in file.names:
            kind = file.dtype(name)
            if dtype is not None and kind in AT_REST:
                kind = torch.float32 if name in wide else dtype
            found[name] = Entry(kind, file.shape(name), partial(blocks, file, name))
    return found


@contextmanager
def _new(output: Path, path: Path) -> Iterator[Path]:
    """A directory that appears when all is written, or not at all."""
    if output.exists():
        raise UserError(f"{output} exists already: name another --output")
    name = hashlib.sha256(f"{os.getuid()} {output.absolute()}".encode()).hexdigest()[:16]
    try:
        with FileLock(Path(tempfile.gettempdir()) / f"halos-export-{name}.lock", timeout=0):
            try:
                with staged(output, main=True, facts={"exported_from": path.name}) as place:  # no place of this machine
                    yield place
            except BaseException:
                shutil.rmtree(output.with_name(HIDDEN + output.name), ignore_errors=True)
                raise
    except Timeout as error:
        raise UserError(f"{output} is being written by another process: wait for it, or name another --output") from error


def _base(saved: Saved, given: Path | None) -> Path:
    """Where the adapter's base lies now. Raises UserError where it is missing, or not the one that was trained on."""
    assert saved.adapter is not None
    base = given or Path(_settings(saved.adapter).base_model_name_or_path or "")
    if not (base / "config.json").is_file():
        where = f"--base {base}: no model lies there" if given else f"{saved.adapter} was trained on {base}, which is not here"
        raise UserError(f"{where}; say where its base lies now with --base DIRECTORY")
    lineage.refuse_other_base(saved.lineage, base, str(saved.adapter))
    return base


def _vocabulary(saved: Saved, base: Path) -> Vocabulary:
    assert saved.adapter is not None
    added = saved.lineage["runs"][-1]["config"]["model"]["add_tokens"] if saved.lineage else None
    return vocabulary_of(base, saved.adapter, saved.words, added)


def _copy_beside(saved: Saved, place: Path) -> None:
    """The tokenizer, and a value head as it was saved: a later run that has one goes on with it."""
    for pattern in WORDS:
        for file in saved.words.glob(pattern):
            if file.is_file():
                saved.copy(file, place)
    if templates := sorted((saved.words / TEMPLATES).glob("*.jinja")):
        (place / TEMPLATES).mkdir()
        for file in templates:
            saved.copy(file, place / TEMPLATES)
    beside = (saved.head,) if saved.head is not None else (saved.path, saved.path.parent)
    head = next((at for at in beside if (at / VALUE_HEAD / HEAD_FILE).is_file()), None)
    if head is not None and (head in (saved.path, saved.head) or saved.path.name in ("adapter", "model")):
        (place / VALUE_HEAD).mkdir()
        confined.copy(head / VALUE_HEAD / HEAD_FILE, place / VALUE_HEAD / HEAD_FILE, within=head)


def _copy_generation(model: Path, saved: Saved, place: Path) -> None:
    """FINAL's own generation settings, else those of the model."""
    source = next((at for at in (saved.path, model) if (at / "generation_config.json").is_file()), None)
    if source is not None:
        with doing(f"{source}/generation_config.json cannot be used"):
            GenerationConfig.from_pretrained(source).save_pretrained(place)


def _describe(saved: Saved, place: Path, title: str, *, adapter: bool, reward: bool) -> None:
    """Card, lineage and metrics, for others: without what names places on this machine alone."""
    chain = saved.lineage
    with doing(f"{saved.path}/{lineage.NAME} is not what a run writes"):
        if chain is not None:
            facts = {key: value for key, value in chain["runs"][-1]["result"].items() if key not in ("model", "record")}
            chain = lineage.write(place, lineage.public(chain), {"adapter" if adapter else "model": place}, **facts)
        if metrics := select.metrics_of(saved.path):
            (place / "metrics.json").write_text(json.dumps(metrics, indent=1))
        card.write(place, chain, adapter=adapter, reward=reward, title=title)
