"""Generation settings to be saved with a model: such as transformers saves, and ending where training ends."""

import logging
from collections.abc import Sequence
from copy import deepcopy

from transformers import GenerationConfig, PreTrainedTokenizerBase

from halos.errors import UserError

log = logging.getLogger(__name__)


def settings_for(given: GenerationConfig, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> GenerationConfig:
    """A copy of a model's settings whose end tokens include the tokenizer's and `stops`: training scores them, so serving must
    stop there. What transformers would refuse to save is taken out, and told. Raises UserError for what cannot be mended."""
    settings = deepcopy(given)
    ids = settings.eos_token_id if settings.eos_token_id is not None else []
    ids = list(ids) if isinstance(ids, list) else [ids]
    own = tokenizer.eos_token_id
    settings.eos_token_id = list(dict.fromkeys([*([own] if own not in ids else []), *ids, *stops]))
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    _remove_refused(settings)
    return settings


def _remove_refused(settings: GenerationConfig) -> None:
    """Take out, one after the other, the settings without which transformers' own check has less to say."""
    plain = GenerationConfig()
    complaint, removed = _complaint(settings), []
    while complaint:
        for name, value in sorted(settings.to_diff_dict().items()):
            if name.endswith("_token_id") or not hasattr(plain, name):
                continue
            setattr(settings, name, getattr(plain, name))
            rest = _complaint(settings)
            if len(rest) < len(complaint):
                removed.append(f"{name}={value}")
                complaint = rest
                break
            setattr(settings, name, value)
        else:
            raise UserError(f"the model's generation_config.json could not be saved again: {complaint.splitlines()[-1]}")
    if removed:
        log.warning("generation settings that transformers refuses to save are left out: %s", ", ".join(removed))


def _complaint(settings: GenerationConfig) -> str:
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return str(error)
    return ""
