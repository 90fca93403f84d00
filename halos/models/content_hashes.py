"""Hashes of what decides a model's computation besides its weights: its tokenizer, chat template and config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from halos import confined
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
        settings = confined.load_object(path) if path is not None and path.is_file() else None
        used = None if settings is None else {key: value for key, value in settings.items() if key not in UNREAD}
        hashes[f"{name}.{file}"] = None if used is None else json_hash(used)
    return hashes
