"""Check the paths of a configuration on this machine: models, data, and directories to write to."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from glob import iglob
from pathlib import Path
from typing import Any

from halos import confined
from halos.config.rollout_modules import scorer_class
from halos.config.schema import Config, Scorer, path_keys
from halos.config.suggest import nearest
from halos.errors import UserError

BUNDLED_DATA = ("arithmetic",)
BUNDLED_MODELS = ("tiny",)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # of a data set also org/name:config
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
FILES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", *COMPRESSED, ".arrow", ".feather", ".gguf", ".bin", ".pt",
         ".safetensors", ".jinja")  # fmt: skip
HUB_URL = "hf://datasets/"  # before org/name/file.json
SHARD_MARK = b'\\"saved_offsets\\"'  # in a header, torch.distributed.checkpoint's: JSON within JSON
MAX_HEADER = 100_000_000  # bytes, the limit of safetensors
MIN_FREE = 50 * 2**20  # bytes, for even the smallest run


def absolute(value: Any) -> Any:
    """Return an existing path as an absolute one, also within entries of data; any other value unchanged."""
    if isinstance(value, list):
        return [absolute(entry) for entry in value]
    if isinstance(value, Mapping):
        return {**value, "path": absolute(value["path"])} if isinstance(value.get("path"), str) else value
    if not isinstance(value, str) or "{" in value or value in BUNDLED_MODELS + BUNDLED_DATA:
        return value
    path = _expanded(value)
    return os.path.abspath(path) if os.path.exists(path) or _matches(path) else path


def _matches(pattern: str) -> bool:
    """Return whether a path is a pattern, data/*.jsonl, which some file matches."""
    return any(mark in pattern for mark in "*?[") and next(iglob(pattern, recursive=True), None) is not None


def check_paths(config: Config, choices: Mapping[str, Sequence[str]]) -> None:
    """Make existing paths absolute and expand ~, in place. Raises UserError for a path that does not exist."""
    config.output_root, config.run_dir, config.cache_dir = map(_expanded, (config.output_root, config.run_dir, config.cache_dir))
    for model, key in ((config.model, "model.name_or_path"), (config.reference, "reference.name_or_path")):
        if model.name_or_path is not None:
            model.name_or_path = _expanded(model.name_or_path)
            check_model(model.name_or_path, key, choices.get("model", ()))
    template = config.model.chat_template
    if template is not None and template.endswith(".jinja") and not Path(template).is_file():
        raise UserError(f"model.chat_template: there is no file {template}{_suggestion(template)}")
    if config.data.root is not None and not Path(_expanded(config.data.root)).is_dir():
        raise UserError(f"data.root: there is no directory {config.data.root}{_suggestion(config.data.root)}")
    config.data.train = [_check_source(source, f"data.train.{i}", config) for i, source in enumerate(config.data.train)]
    config.data.eval = [_check_source(source, f"data.eval.{i}", config) for i, source in enumerate(config.data.eval)]
    _check_init_from(config)
    _make_absolute(config)
    if not config.data.train:
        raise UserError("data.train is []: give at least one file or name, 'data.train=[a.jsonl]'")
    _check_writable(config.run_dir, "run_dir")
    _check_writable(config.cache_dir, "cache_dir")


def _make_absolute(config: Config) -> None:
    """Make paths absolute: a run may be resumed from another directory, where a relative one would name something else."""
    for key in path_keys():
        section, name = _section(config, key)
        is_no_path = isinstance(section, Scorer) and name not in scorer_class(section.name).paths  # a model's name at an API, say
        if section is not None and not is_no_path:
            _put(section, name, absolute(_get(section, name)))


def _section(config: Config, key: str) -> tuple[Any, str]:
    """Return the section of a key, None where the configuration has no such section, and the key's name in it."""
    *sections, name = key.split(".")
    node: Any = config
    for section in sections:
        node = None if node is None else _get(node, section)
    return node, name


def _get(node: Any, name: str) -> Any:
    return node.get(name) if isinstance(node, Mapping) else getattr(node, name)


def _put(node: Any, name: str, value: Any) -> None:
    """Set a value of a section, which is a mapping where it has a `_target_`."""
    if isinstance(node, dict):
        node[name] = value
    else:
        setattr(node, name, value)


def _check_init_from(config: Config) -> None:
    """Check the adapter and the optimizer state that a new run starts from."""
    if (adapter := config.peft.init_from) is not None and not Path(adapter).is_dir():
        raise UserError(f"peft.init_from: there is no directory {adapter}{_suggestion(adapter)}")
    if not config.resume:
        check_optimizer_state(config)


def check_optimizer_state(config: Config) -> None:
    """Raises UserError where optim.init_from, the optimizer state that a run starts from, is no checkpoint."""
    if (checkpoint := config.optim.get("init_from")) is not None and not (Path(checkpoint) / "state").is_dir():
        raise UserError(
            f"optim.init_from: {checkpoint} is no checkpoint (it has no state/), such as runs/demo/checkpoints/step-00000100"
        )


def _check_source(source: Any, key: str, config: Config) -> Any:
    """Check the path or name of an entry of data.train or data.eval; other keys of a mapping are checked where data are read."""
    path = source.get("path") if isinstance(source, Mapping) else source
    if path is None and config.data.root is None and isinstance(source, Mapping) and "format" in source:
        raise UserError(f"data.root is missing: data={source['format']} reads its files from there, data.root=DIRECTORY")
    if not isinstance(path, str):
        return source
    path = _expanded(path)
    _check_data(path, key)
    return {**source, "path": path} if isinstance(source, Mapping) else path


def _check_data(path: str, key: str) -> None:
    if path in BUNDLED_DATA or Path(path).exists() or path.startswith(HUB_URL) or _matches(path):
        return
    if any(mark in path for mark in "*?["):
        raise UserError(f"{key}: no file matches the pattern {path}{_suggestion(path)}")
    if HUB_ID.fullmatch(path) and not _is_path(path):
        return
    names = ", ".join(BUNDLED_DATA)
    hint = _suggestion(path) or ("" if _is_path(path) else f"; a hub data set is written org/name, the bundled ones are: {names}")
    raise UserError(f"{key}: there is no file or directory {path}{hint}")


def check_model(path: str, key: str, choices: Sequence[str] = ()) -> None:
    """Raises UserError unless `path` is a hub id, a .gguf file, or a directory that from_pretrained loads without unpickling."""
    directory = Path(path)
    if path in BUNDLED_MODELS:
        return
    if not directory.exists():
        if HUB_ID.fullmatch(path) and not _is_path(path):
            return
        choice = nearest(path, choices)
        meant = f"did you mean model={choice}? A" if choice else "a"
        hint = _suggestion(path) or ("" if _is_path(path) else f"; {meant} hub id looks like org/name")
        raise UserError(f"{key}: there is no directory or file {path}{hint}")
    if directory.is_file():
        if directory.suffix != ".gguf":
            raise UserError(f"{key}: {path} is a file, and only a .gguf file can be a model: give the directory that it is in")
        return
    if not (directory / "config.json").is_file():
        raise UserError(f"{key}: {path} has no config.json, so it is no model{_hint(directory)}")
    _check_weights(directory, key)


def _check_weights(directory: Path, key: str) -> None:
    if any(map(_is_sharded, directory.glob("*.safetensors"))):
        raise UserError(
            f"{key}: {directory} is a sharded model, of which each rank wrote its part: make it whole first,"
            f" python -m halos.checkpoint export {directory.parent} --output DIRECTORY"
        )
    if not any(directory.glob("*.safetensors")):
        if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
            raise UserError(
                f"{key}: {directory} has its weights in pickled files (*.bin, *.pt), and nothing is unpickled here, because"
                " a pickle can run code: convert them to safetensors, with save_pretrained on a machine that you trust them on"
            )
        raise UserError(f"{key}: {directory} has a config.json but no weights: *.safetensors is missing{_hint(directory)}")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        named = confined.load_object(index).get("weight_map")
        parts = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
        missing = [part for part in parts if not (directory / part).is_file()]
        if missing:
            raise UserError(f"{key}: {directory} lacks {len(missing)} of {len(parts)} parts of its weights, {missing[0]} for one")


def _is_sharded(file: Path) -> bool:
    """Return whether a safetensors file holds shards: its header says where in the whole tensors they begin."""
    with file.open("rb") as opened:
        return SHARD_MARK in opened.read(min(int.from_bytes(opened.read(8), "little"), MAX_HEADER))


def _hint(directory: Path) -> str:
    """Return a hint for a directory that halos wrote and that is no model."""
    if (directory / "FINAL" / "config.json").is_file():
        return f"; it is a run, whose model is {directory / 'FINAL'}"
    if (directory / "adapter_config.json").is_file():
        return "; it is an adapter: merge it first, python -m halos.checkpoint merge"
    return ""


def _is_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text.endswith(("/", *FILES)) or (os.sep != "/" and os.sep in text)


def _suggestion(path: str) -> str:
    """Return `; did you mean b.jsonl?` from the neighbours of a path that does not exist."""
    parent = Path(path).parent
    if not parent.is_dir():
        return f"; there is no directory {parent}"
    near = nearest(Path(path).name, [entry.name for entry in parent.iterdir()])
    return f"; did you mean {parent / near}?" if near else ""


def _check_writable(path: str, key: str) -> None:
    """Raises UserError where a directory cannot be written to."""
    parent = Path(path).absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{key}: {path} cannot be created, because {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{key}: no permission to write in {parent}, for {path}; choose another directory with {key}=")
    free = shutil.disk_usage(parent).free
    if free < MIN_FREE:
        raise UserError(
            f"{key}: only {free / 2**20:.0f} MB are free in {parent}: make room, or choose another directory with {key}="
        )


def _expanded(path: str) -> str:
    return os.path.expanduser(path) if path.startswith("~") else path
