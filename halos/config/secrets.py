"""Keep secrets out of a run's configuration, which is saved."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from halos.config.rollout_modules import engine_class, scorer_class
from halos.config.schema import Config
from halos.errors import UserError, one_line
from halos.redaction import MIN_LENGTH_INSIDE, SUFFIXES, environment_secrets, secret_in_url

KEYS = re.compile(
    r"(.*_)?((api|access|secret|private)_?key|(api|access|auth|bearer|refresh|session|hf|github|gitlab|slack)_?token"
    r"|secret|password|passwd|passphrase|pwd)"
)
TOKEN = re.compile(r".*token")  # may also be a word of a vocabulary, which its value tells
TOKEN_VALUE = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w.:+/=-]{16,}")
VARIABLES = re.compile(rf"[A-Z]\w*_({'|'.join(SUFFIXES)})")
NEVER_SAVED = ("hydra", "plugins", "resume", "overwrite", "dry_run", "dry_run_rows", "resume_changes", "cache_dir", "run_dir",
               "output_root")  # fmt: skip


def refuse_saved_addresses(config: Config, overridden: Collection[str]) -> None:
    """Raises UserError where a saved run, which may be a stranger's, names a program that would be run, an address that an API
    key would be sent to, or how processes are launched, unless the key is among `overridden`, the keys of this command."""
    if (online := config.online) is None:
        return
    sampler, scorer = online.sampler, online.scorer
    used = {
        **{f"online.sampler.{name}": getattr(sampler, name) for name in engine_class(sampler.name).addresses},
        "online.config_file": online.config_file,
        **{f"online.scorer.{name}": getattr(scorer, name) for name in scorer_class(scorer.name).addresses},
    }
    for key, value in used.items():
        if value is not None and key not in overridden:
            raise UserError(
                f"{config.run_dir} names {key}={value}, and programs and addresses are never taken from a saved run:"
                " pass it again"
            )


def refuse_saved_overrides(overrides: Sequence[str], path: str) -> None:
    """Raises UserError where overrides that a saved run passes to commands are more than values and choices of a training."""
    for override in overrides:
        key, equal, _ = override.lstrip("+~").partition("=")
        section, leaves_out = re.split(r"[./@]", key)[0], override.startswith("~")
        if not (equal or leaves_out) or not re.fullmatch(r"[A-Za-z_][\w./]*", key) or section in NEVER_SAVED:
            raise UserError(f"{path} holds {one_line(repr(override))}, which is never taken from a saved run: remove it")


def refuse_secrets(node: Any, overrides: Sequence[str] = (), *, spelled: Callable[[str], str] = str) -> None:
    """Raises UserError where a configuration (plain lists and mappings) or an override holds a secret; never shows it. `spelled`
    is how the user writes a key."""
    secrets = environment_secrets()
    for key, value in _leaves(node):
        if value is not None and (_names_a_secret(key) or _is_token(key, value)):
            raise UserError(f"{spelled(key)} would be saved in the run's config.yaml: {_REMEDY}")
        if name := _secret_in(str(value), secrets):
            raise UserError(f"{spelled(key)} holds the value of the environment variable {name}, and would be saved: {_REMEDY}")
        _refuse_url(spelled(key), str(value))
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        parts = re.split(r"[\s,:'\"()\[\]{}]+", value)  # of a list, a mapping or a sweep
        if _names_a_secret(key) or _is_token(key, value) or any(_secret_in(part, secrets) for part in parts):
            raise UserError(f"{key} holds a secret, and overrides are saved with the run: {_REMEDY}")
        _refuse_url(key, value)


def _refuse_url(key: str, value: str) -> None:
    if what := secret_in_url(value):
        raise UserError(
            f"{key} holds {what} in a URL, and would be saved: leave it out of the URL. The key of an API is read from"
            " OPENAI_API_KEY; for a server that wants anything else, give the URL of a proxy that adds it"
        )


_REMEDY = (
    "leave it out and keep the secret in the environment (OPENAI_API_KEY, WANDB_API_KEY, HF_TOKEN), where the libraries read it"
)


def _names_a_secret(key: str) -> bool:
    """By the name of a key, or of an environment variable in it (hydra.job.env_set.HF_TOKEN)."""
    name = key.rpartition(".")[2]
    return bool(KEYS.fullmatch(name.lower().replace("-", "_")) or VARIABLES.fullmatch(name))


def _is_token(key: str, value: Any) -> bool:
    return bool(TOKEN.fullmatch(key.rpartition(".")[2].lower()) and isinstance(value, str) and TOKEN_VALUE.fullmatch(value))


def _secret_in(text: str, known: Mapping[str, str]) -> str | None:
    if text in known:
        return known[text]
    return next((name for value, name in known.items() if len(value) >= MIN_LENGTH_INSIDE and value in text), None)


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{key}.{index}")
    else:
        yield key, node
