"""Hashes of what decides a model's computation besides its weights: its tokenizer, chat template and config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halos import confined
from halos.errors import user_errors
from halos.hashes import file_hash, json_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG, GENERATION = "config.json", "generation_config.json"
UNREAD = ("transformers_version", "_name_or_path")  # keys of a config.json that affect no computation


def tokenizer_hashes(
    name: str, directory: Path, tokenizer: PreTrainedTokenizerBase, cache: Path | None = None
) -> dict[str, str | None]:
    """Hash the tokenizer that was loaded from a directory, and its chat template, under the name of the model.

    The tokenizer's is of its file and the loaded vocabulary, not of what a version of the library would write.
    """
    file = directory / "tokenizer.json"
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [file_hash(file, cache) if file.is_file() else None, sorted(tokenizer.get_vocab().items()), special]
    return {f"{name}.chat_template": json_hash(tokenizer.chat_template), f"{name}.tokenizer": json_hash(parts)}


def config_hashes(name: str, directory: Path | None, files: Sequence[str] = (CONFIG, GENERATION)) -> dict[str, str | None]:
    """Hash the config files of a model, under its name; None for one that it does not have."""
    hashes: dict[str, str | None] = {}
    for file in files:
        path = directory / file if directory is not None else None
        hashes[f"{name}.{file}"] = json_hash(settings_of(path)) if path is not None and path.is_file() else None
    return hashes


def settings_of(path: Path) -> dict[str, Any]:
    """Return what a config.json says, without the keys that affect no computation."""
    return {key: value for key, value in confined.load_object(path).items() if key not in UNREAD}


def changed_settings(recorded: Mapping[str, Any], path: Path) -> list[str]:
    """Return how the config.json at `path` differs from a `recorded` one, as the installed transformers reads both: to have been
    saved again by another version, which renames keys and adds defaults, is no difference."""
    before, now = _as_read(recorded, path), _as_read(settings_of(path), path)
    return [
        f"{key} {json.dumps(before.get(key))} -> {json.dumps(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _as_read(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING  # here: it imports torch

    with user_errors(f"{path} is not a configuration that transformers knows"):
        config = CONFIG_MAPPING[settings["model_type"]].from_dict(dict(settings))
    return json.loads(
        config.to_json_string(use_diff=False),
        object_hook=lambda part: {key: value for key, value in part.items() if key not in UNREAD},
    )
