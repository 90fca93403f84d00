"""Resolve model.name_or_path to a local directory of safetensors, which everything else reads."""

import hashlib
import logging
import os
from pathlib import Path

from filelock import FileLock

from halos.confined import NO_CODE, SAFELY, expanded
from halos.errors import UserError, user_errors

log = logging.getLogger(__name__)

OFFLINE_HINT = "without a network give a local directory or model=tiny"
FILE_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]  # no pickles, no code


def locate(name: str, revision: str | None, cache_dir: Path, key: str = "model.name_or_path") -> Path:
    """Return a directory with config.json, safetensors and tokenizer; built, converted or downloaded where there is none yet.

    That a directory holds a model was checked with the config. Raises UserError, naming `key`, for an unavailable hub id.
    """
    path = expanded(name)
    if name == "tiny":
        return _tiny(cache_dir)
    if path.suffix == ".gguf":
        return _converted(path, cache_dir, key)
    if path.is_dir():
        return path.resolve()
    return _downloaded(name, revision, key)


def _tiny(cache_dir: Path) -> Path:
    from halos.models import tiny

    directory = cache_dir / "models" / f"tiny-{tiny.fingerprint()}"
    if not directory.exists():
        tiny.build(directory)
    return directory


def _converted(path: Path, cache_dir: Path, key: str) -> Path:
    """Convert a .gguf file to float32 safetensors, once, cached by a hash of its bytes."""
    if not path.is_file():
        raise UserError(f"{key}={path}: no such file")
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    directory = cache_dir / "models" / f"{path.stem}-{content}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f".{directory.name}.lock")):  # one run converts, and others wait
        if not directory.exists():
            _convert(path, directory)
    return directory


def _convert(path: Path, directory: Path) -> None:
    try:
        import gguf  # noqa: F401  transformers needs it to read the file
    except ImportError as error:
        raise UserError("reading .gguf files needs the package gguf: pip install gguf") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("converting %s to safetensors, once", path)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **SAFELY)
    model.config.__dict__.pop("quantization_config", None)
    model.config._name_or_path = ""
    clean = type(model)(type(model.config).from_dict(model.config.to_dict()))
    clean.load_state_dict(model.state_dict())
    clean.save_pretrained(partial)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **NO_CODE)
    assert tokenizer is not None, "transformers finds the tokenizer in the file"
    tokenizer.save_pretrained(partial)
    partial.rename(directory)


def _downloaded(name: str, revision: str | None, key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError

    try:
        with user_errors(f"{key}={name}: no such directory here, and it could not be downloaded from the hub", OFFLINE_HINT):
            return Path(snapshot_download(name, revision=revision, allow_patterns=FILE_PATTERNS))
    except UserError as error:
        if isinstance(error.__cause__, GatedRepoError):
            raise UserError(f"{name} is gated: accept its terms on the hub and log in with `hf auth login`") from error.__cause__
        if isinstance(error.__cause__, HFValidationError):
            raise UserError(f"{key}={name}: no such directory, and not a hub id (org/name)") from error.__cause__
        raise
