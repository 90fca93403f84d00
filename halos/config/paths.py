"""What a configuration points at on this machine: models, data and room to write."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halos import confined
from halos.config.schema import Config, Scorer, path_keys
from halos.config.suggest import nearest
from halos.errors import UserError

BUNDLED_DATA = ("arithmetic",)
BUNDLED_MODELS = ("tiny",)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # of a data set also org/name:config
FILES = (".json", ".jsonl", ".parquet", ".csv", ".txt", ".gz", ".zst", ".arrow", ".gguf", ".bin", ".safetensors", ".pt", ".jinja")
PART = b'\\"saved_offsets\\"'  # in a header, torch.distributed.checkpoint's: JSON within JSON
HEADER = 100_000_000  # bytes, the most that a safetensors header has
MIN_FREE = 50 * 2**20  # bytes; less than this holds no run, however small


def absolute(value: Any) -> Any:
    """A path that leads somewhere from here as one that leads there from anywhere, in entries of data too; the rest as it is."""
    if isinstance(value, list):
        return [absolute(entry) for entry in value]
    if isinstance(value, Mapping):
        return {**value, "path": absolute(value["path"])} if isinstance(value.get("path"), str) else value
    if not isinstance(value, str) or "{" in value or value in BUNDLED_MODELS + BUNDLED_DATA:
        return value
    path = _expanded(value)
    return os.path.abspath(path) if os.path.exists(path) else path


def check_paths(config: Config, choices: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError for a path that leads nowhere; makes those that do lead there from anywhere, and expands ~."""
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
        raise UserError("data.train is []: give at least one file or name, data.train=[a.jsonl]")
    _check_writable(config.run_dir, "run_dir")
    _check_writable(config.cache_dir, "cache_dir")


def _make_absolute(config: Config) -> None:
    """A run may be gone on with from another directory, where a relative path would lead nowhere, or elsewhere."""
    for key in path_keys():
        section, name = _section(config, key)
        is_judge = isinstance(section, Scorer) and name == "model" and section.name == "judge"  # which lies behind an API
        if section is not None and not is_judge:
            _put(section, name, absolute(_get(section, name)))


def _section(config: Config, key: str) -> tuple[Any, str]:
    """The part of a configuration that has a key, None where it has no such part, and the key's name in it."""
    *sections, name = key.split(".")
    node: Any = config
    for section in sections:
        node = None if node is None else _get(node, section)
    return node, name


def _get(node: Any, name: str) -> Any:
    return node.get(name) if isinstance(node, Mapping) else getattr(node, name)


def _put(node: Any, name: str, value: Any) -> None:
    """In a section, or in the mapping that a node with a target is."""
    if isinstance(node, dict):
        node[name] = value
    else:
        setattr(node, name, value)


def _check_init_from(config: Config) -> None:
    """What a run goes on from besides its model."""
    if (adapter := config.peft.init_from) is not None and not Path(adapter).is_dir():
        raise UserError(f"peft.init_from: there is no directory {adapter}{_suggestion(adapter)}")
    if not config.resume:
        check_optimizer_state(config)


def check_optimizer_state(config: Config) -> None:
    """Raises UserError where a run that begins at step 0 is to begin with the optimizer of no checkpoint."""
    if (saved := config.optim.get("init_from")) is not None and not (Path(saved) / "state").is_dir():
        raise UserError(
            f"optim.init_from: {saved} is no checkpoint (it has no state/), such as runs/demo/checkpoints/step-00000100"
        )


def _check_source(source: Any, key: str, config: Config) -> Any:
    """One entry of data.train or data.eval: a path or a name, alone or in a mapping, whose other keys are the data's to check."""
    path = source.get("path") if isinstance(source, Mapping) else source
    if path is None and config.data.root is None and isinstance(source, Mapping) and "format" in source:
        raise UserError(f"data.root is missing: data={source['format']} reads its files from there, data.root=DIRECTORY")
    if not isinstance(path, str):
        return source
    path = _expanded(path)
    _check_data(path, key)
    return {**source, "path": path} if isinstance(source, Mapping) else path


def _check_data(path: str, key: str) -> None:
    if path in BUNDLED_DATA or Path(path).exists():
        return
    if HUB_ID.fullmatch(path) and not _is_path(path):
        return
    names = ", ".join(BUNDLED_DATA)
    hint = _suggestion(path) or ("" if _is_path(path) else f"; a hub data set is written org/name, the bundled ones are: {names}")
    raise UserError(f"{key}: there is no file or directory {path}{hint}")


def check_model(path: str, key: str, choices: Sequence[str] = ()) -> None:
    """A hub id, a directory that plain `from_pretrained` can load without unpickling anything, or a .gguf file."""
    place = Path(path)
    if path in BUNDLED_MODELS:
        return
    if not place.exists():
        if HUB_ID.fullmatch(path) and not _is_path(path):
            return
        choice = nearest(path, choices)
        meant = f"did you mean model={choice}? A" if choice else "a"
        hint = _suggestion(path) or ("" if _is_path(path) else f"; {meant} hub id looks like org/name")
        raise UserError(f"{key}: there is no directory or file {path}{hint}")
    if place.is_file():
        if place.suffix != ".gguf":
            raise UserError(f"{key}: {path} is a file, and of files only .gguf can be a model: give the directory around it")
        return
    if not (place / "config.json").is_file():
        raise UserError(f"{key}: {path} has no config.json, so it is no model{_hint(place)}")
    _check_weights(place, key)


def _check_weights(place: Path, key: str) -> None:
    if any(map(_is_sharded, place.glob("*.safetensors"))):
        raise UserError(
            f"{key}: {place} is a model of which each process wrote its part: make it whole first, python -m halos.checkpoint"
            f" export {place.parent} --output DIRECTORY"
        )
    if not any(place.glob("*.safetensors")):
        if any(place.glob("*.bin")) or any(place.glob("*.pt")) or any(place.glob("*.pth")):
            raise UserError(
                f"{key}: {place} has its weights in pickled files (*.bin, *.pt), and nothing is unpickled here, because a pickle"
                " can run code: convert them to safetensors, with save_pretrained on a machine that you trust them on"
            )
        raise UserError(f"{key}: {place} has a config.json but no weights: *.safetensors is missing{_hint(place)}")
    index = place / "model.safetensors.index.json"
    if index.is_file():
        named = confined.load_object(index).get("weight_map")
        parts = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
        missing = [part for part in parts if not (place / part).is_file()]
        if missing:
            raise UserError(f"{key}: {place} lacks {len(missing)} of {len(parts)} parts of its weights, {missing[0]} for one")


def _is_sharded(file: Path) -> bool:
    """Whether a safetensors file says of its tensors where in whole ones they begin."""
    with file.open("rb") as opened:
        return PART in opened.read(min(int.from_bytes(opened.read(8), "little"), HEADER))


def _hint(place: Path) -> str:
    """What was probably meant, where a directory is of ours but no model."""
    if (place / "FINAL" / "config.json").is_file():
        return f"; it is a run, whose model is {place / 'FINAL'}"
    if (place / "adapter_config.json").is_file():
        return "; it is an adapter: merge it first, python -m halos.checkpoint merge"
    return ""


def _is_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text.endswith(("/", *FILES)) or (os.sep != "/" and os.sep in text)


def _suggestion(path: str) -> str:
    """`; did you mean b.jsonl?` from what lies beside a path that does not exist."""
    parent = Path(path).parent
    if not parent.is_dir():
        return f"; there is no directory {parent}"
    near = nearest(Path(path).name, [entry.name for entry in parent.iterdir()])
    return f"; did you mean {parent / near}?" if near else ""


def _check_writable(path: str, key: str) -> None:
    """Raises UserError where nothing could be written."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{key}: {path} cannot be made, because {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{key}: no permission to write in {place}, for {path}; choose another place with {key}=")
    free = shutil.disk_usage(place).free
    if free < MIN_FREE:
        raise UserError(f"{key}: only {free / 2**20:.0f} MB are free in {place}: make room, or choose another place with {key}=")


def _expanded(path: str) -> str:
    return os.path.expanduser(path) if path.startswith("~") else path
