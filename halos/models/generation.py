"""Generation settings to save with a model: accepted by transformers, and with the end tokens of training."""

import logging
from collections.abc import Sequence
from copy import deepcopy

from transformers import GenerationConfig, PreTrainedTokenizerBase

from halos.errors import UserError

log = logging.getLogger(__name__)


def settings_for(original: GenerationConfig, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> GenerationConfig:
    """Return a copy of a model's settings whose end tokens include the tokenizer's and `stops`, which it is trained to emit.

    Settings that transformers refuses to save are removed with a warning. Raises UserError where that does not help.
    """
    settings = deepcopy(original)
    ids = settings.eos_token_id if settings.eos_token_id is not None else []
    ids = list(ids) if isinstance(ids, list) else [ids]
    own = tokenizer.eos_token_id
    settings.eos_token_id = list(dict.fromkeys([*([own] if own not in ids else []), *ids, *stops]))
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    _remove_refused(settings)
    return settings


def _remove_refused(settings: GenerationConfig) -> None:
    """Remove, one after the other, settings whose removal shortens the complaint of transformers' own check."""
    defaults = GenerationConfig()
    complaint, removed = _complaint(settings), []
    while complaint:
        for name, value in sorted(settings.to_diff_dict().items()):
            if name.endswith("_token_id") or not hasattr(defaults, name):
                continue
            setattr(settings, name, getattr(defaults, name))
            remaining = _complaint(settings)
            if len(remaining) < len(complaint):
                removed.append(f"{name}={value}")
                complaint = remaining
                break
            setattr(settings, name, value)
        else:
            raise UserError(f"the model's generation_config.json cannot be saved again: {complaint.splitlines()[-1]}")
    if removed:
        log.warning("generation settings that transformers refuses to save are removed: %s", ", ".join(removed))


def _complaint(settings: GenerationConfig) -> str:
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return str(error)
    return ""
