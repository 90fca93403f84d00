"""Export a checkpoint or FINAL: merged, adapter or full model, with tokenizer, generation settings, card and lineage."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from peft import PeftConfig
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from halos import confined
from halos.checkpoint import card, lineage, select
from halos.checkpoint.commit import HIDDEN, DiskFullError, staged
from halos.checkpoint.weights import HEAD_FILE, VALUE_HEAD
from halos.confined import NO_CODE
from halos.errors import UserError, user_errors
from halos.export.consolidate import consolidated
from halos.export.saved_model import SavedModel
from halos.logps.vocabulary import Vocabulary
from halos.merge import deviation, expected
from halos.merge.base_weights import TensorNames
from halos.merge.merge_and_prove import case_of, merge_and_prove, read_tokenizer, vocabulary_of
from halos.merge.proof import Case
from halos.merge.safetensors_io import SHARD, Entry, SafeFile, blocks, weight_files, write_sharded
from halos.models.load import describe_head
from halos.reward_kind import RewardKind

TEMPLATES = "additional_chat_templates"  # directory of the tokenizer's named chat templates, next to the default one
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab*", "merges.txt")
CASTABLE = {torch.float64, torch.float32, torch.float16, torch.bfloat16}  # dtypes of weights that --dtype converts


def merged(path: Path, output: Path, *, dtype: torch.dtype | None = None, base: Path | None = None, shard: int = SHARD) -> str:
    """Merge an adapter into `output`, or copy the weights of a FINAL, which its run merged; return a summary in words.

    `dtype` None keeps that of the base, or of FINAL's weights; `base` is the base's directory now. Raises UserError where there
    is no adapter, its base is missing or another one, the proof fails, or `output` exists.
    """
    saved = SavedModel.at(path)
    if saved.adapter is None:
        raise UserError(f"{path} holds no adapter: there is nothing to merge")
    if saved.model is not None and base is None and dtype in (None, _config(saved.model).dtype):
        return whole(path, output, shard=shard)  # FINAL's weights, which the run merged and proved
    base = _base(saved, base)
    with _new_directory(output, path) as hidden:
        case = case_of(base, saved.adapter, _vocabulary(saved, base), dtype=dtype)
        result = merge_and_prove(case, hidden, lineage.hashes, model=_described(case, base, saved.tokenizer), shard=shard)
        if not result.holds:
            raise UserError(f"the merged model differs from base and adapter: {result}. Nothing was exported")
        _copy_tokenizer_and_head(saved, hidden)
        if not case.reward:
            _copy_generation(base, saved, hidden)
        _write_description(saved, hidden, output.name, adapter=False, reward=case.reward)
    return str(result)


def _described(case: Case, base: Path, tokenizer: Path) -> PreTrainedModel:
    """Return the model without weights; of a reward model with the config that its run writes into FINAL."""
    model = case.empty_model()
    if case.reward is not None and (tokenizer / "tokenizer_config.json").is_file():
        pad = read_tokenizer(tokenizer).pad_token_id
        describe_head(model, case.reward, pad, fresh=RewardKind.of_architectures(_config(base).architectures) is not case.reward)
    return model


def adapter(path: Path, output: Path, *, base: Path | None = None) -> str:
    """Export the adapter alone, in PEFT's format. It names `base` as its base if given, else a base from the hub by its name."""
    saved = SavedModel.at(path)
    if saved.adapter is None:
        raise UserError(f"{path} holds no adapter: leave out --adapter")
    if base is not None:
        _base(saved, base)
    with _new_directory(output, path) as hidden:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            saved.copy(saved.adapter / file, hidden)
        vocabulary = Vocabulary.load(saved.adapter)
        if vocabulary is not None:
            vocabulary.save(hidden)
        if (saved.home / "generation_config.json").is_file():
            _copy_generation(saved.home, saved, hidden)
        chain, settings = saved.lineage, hidden / "adapter_config.json"
        name = chain["runs"][-1]["base"]["name"] if chain else ""
        if base is not None or lineage.on_the_hub(name):
            name_now = {"base_model_name_or_path": str(base.resolve()) if base is not None else name}
            settings.write_text(json.dumps({**confined.load_object(settings), **name_now}, indent=2))
        _copy_tokenizer_and_head(saved, hidden)
        reward = RewardKind.of_task(_peft_config(hidden).task_type)
        _write_description(saved, hidden, output.name, adapter=True, reward=reward)
    return "the adapter as it was saved"


def whole(path: Path, output: Path, *, dtype: torch.dtype | None = None, shard: int = SHARD) -> str:
    """Export a model's weights unchanged, or rounded once to `dtype`."""
    saved = SavedModel.at(path)
    if saved.sharded is None:
        return _whole(saved, path, output, dtype=dtype, shard=shard)
    output.parent.mkdir(parents=True, exist_ok=True)
    with consolidated(
        saved.sharded, output.parent, reward=RewardKind.of_architectures(_config(saved.sharded).architectures)
    ) as full:
        saved = replace(saved, model=full / "model", head=full if (full / VALUE_HEAD).is_dir() else None)
        return _whole(saved, path, output, dtype=dtype, shard=shard)


def _whole(saved: SavedModel, path: Path, output: Path, *, dtype: torch.dtype | None, shard: int) -> str:
    if saved.model is None:
        raise UserError(f"{path} holds an adapter and no whole model: merge it")
    config = _config(saved.model)
    reward = RewardKind.of_architectures(config.architectures)
    float32 = _kept_float32(saved.model, dtype, reward=reward) if dtype is not None else set()
    with _new_directory(output, path) as hidden:
        write_sharded(hidden, _entries(saved.model, dtype, float32), shard)
        _, faults = deviation.compare(hidden, expected.expected_copy(saved.model, float32), dtype)
        if faults:
            raise UserError(f"the exported weights differ from the saved ones: {faults[0]}. Nothing was exported")
        config.dtype = dtype or config.dtype
        config.save_pretrained(hidden)
        _copy_tokenizer_and_head(saved, hidden)
        _copy_generation(saved.model, saved, hidden)
        if (saved.path / "merge_report.json").is_file() and dtype is None:
            saved.copy(saved.path / "merge_report.json", hidden)
        _write_description(saved, hidden, output.name, adapter=False, reward=reward)
    return f"{'the weights as they were saved' if dtype is None else f'rounded to {dtype}'.replace('torch.', '')}"


def _config(model: Path) -> PretrainedConfig:
    with user_errors(f"{model}/config.json cannot be read"):
        return AutoConfig.from_pretrained(model, **NO_CODE)


def _peft_config(adapter: Path) -> PeftConfig:
    confined.load_object(adapter / "adapter_config.json")  # so that an error names the file; PEFT's would not
    with user_errors(f"{adapter}/adapter_config.json is not a PEFT configuration"):
        return PeftConfig.from_pretrained(str(adapter))


def _kept_float32(model: Path, dtype: torch.dtype, *, reward: RewardKind | None) -> set[str]:
    """Return the tensors that from_pretrained keeps in float32 in a model of `dtype`, such as a router's correction bias."""
    names = TensorNames(case_of(model, model, Vocabulary(), dtype=dtype, reward=reward).empty_model())
    in_model = {name: names(name)[0] or name for file in map(SafeFile, weight_files(model)) for name in file.names}
    return {name for name in in_model if names.dtype_of(in_model[name], dtype) is not dtype}


def _entries(model: Path, dtype: torch.dtype | None, float32: Collection[str]) -> dict[str, Entry]:
    entries = {}
    for file in map(SafeFile, weight_files(model)):
        for name in file.names:
            kind = file.dtype(name)
            if dtype is not None and kind in CASTABLE:
                kind = torch.float32 if name in float32 else dtype
            entries[name] = Entry(kind, file.shape(name), partial(blocks, file, name))
    return entries


@contextmanager
def _new_directory(output: Path, path: Path) -> Iterator[Path]:
    """Yield a hidden directory that becomes `output` when it is complete, or is removed."""
    if output.exists():
        raise UserError(f"{output} exists already: name another --output")
    _refuse_unwritable(output)
    name = hashlib.sha256(f"{os.getuid()} {output.absolute()}".encode()).hexdigest()[:16]
    try:
        with FileLock(Path(tempfile.gettempdir()) / f"halos-export-{name}.lock", timeout=0):
            try:
                with staged(output, main=True, facts={"exported_from": path.name}) as hidden:  # no path of this machine
                    yield hidden
            except BaseException:
                shutil.rmtree(output.with_name(HIDDEN + output.name), ignore_errors=True)
                raise
    except DiskFullError as error:
        raise UserError(f"{output}: no space is left there. Nothing was exported: free some, or name another --output") from error
    except Timeout as error:
        raise UserError(f"{output} is being written by another process: wait for it, or name another --output") from error


def _refuse_unwritable(output: Path) -> None:
    """Raises UserError where no directory can be made beside `output`, by trying; creates the directories above it."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=HIDDEN, dir=output.parent):
            pass
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}; name another --output") from error


def _base(saved: SavedModel, moved_to: Path | None) -> Path:
    """Return the directory of the adapter's base. Raises UserError if it is missing, or not the one that was trained on."""
    assert saved.adapter is not None
    base = moved_to or Path(_peft_config(saved.adapter).base_model_name_or_path or "")
    if not (base / "config.json").is_file():
        problem = f"--base {base} holds no model" if moved_to else f"{saved.adapter} was trained on {base}, which is not here"
        raise UserError(f"{problem}; name its base with --base DIRECTORY")
    lineage.refuse_other_base(saved.lineage, base, str(saved.adapter))
    return base


def _vocabulary(saved: SavedModel, base: Path) -> Vocabulary:
    assert saved.adapter is not None
    added = saved.lineage["runs"][-1]["config"]["model"]["add_tokens"] if saved.lineage else None
    return vocabulary_of(base, saved.adapter, saved.tokenizer, added)


def _copy_tokenizer_and_head(saved: SavedModel, output: Path) -> None:
    """Copy the tokenizer, and a value head unchanged: a later run with a value head starts from it."""
    for pattern in TOKENIZER_FILES:
        for file in saved.tokenizer.glob(pattern):
            if file.is_file():
                saved.copy(file, output)
    if templates := sorted((saved.tokenizer / TEMPLATES).glob("*.jinja")):
        (output / TEMPLATES).mkdir()
        for file in templates:
            saved.copy(file, output / TEMPLATES)
    head = saved.head or saved.home
    if (head / VALUE_HEAD / HEAD_FILE).is_file():
        (output / VALUE_HEAD).mkdir()
        confined.copy(head / VALUE_HEAD / HEAD_FILE, output / VALUE_HEAD / HEAD_FILE, within=head)


def _copy_generation(model: Path, saved: SavedModel, output: Path) -> None:
    """Copy the generation settings of `saved`, else those of `model`."""
    source = next((at for at in (saved.home, model) if (at / "generation_config.json").is_file()), None)
    if source is not None:
        with user_errors(f"{source}/generation_config.json cannot be used"):
            GenerationConfig.from_pretrained(source).save_pretrained(output)


def _write_description(saved: SavedModel, output: Path, title: str, *, adapter: bool, reward: RewardKind | None) -> None:
    """Write card, lineage and metrics, without paths that mean something on this machine only."""
    chain = saved.lineage
    with user_errors(f"{saved.path}/{lineage.NAME} is not what a run writes"):
        if chain is not None:
            facts = {key: value for key, value in chain["runs"][-1]["result"].items() if key not in ("model", "record")}
            chain = lineage.write(output, lineage.public(chain), {"adapter" if adapter else "model": output}, **facts)
        if metrics := select.metrics_of(saved.home):
            (output / "metrics.json").write_text(json.dumps(metrics, indent=1))
        card.write(output, chain, adapter=adapter, reward=reward, title=title)
