"""Check that the adapter of peft.init_from was trained on this run's base model and tokenizer."""

import logging
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from halos import confined
from halos.checkpoint import lineage
from halos.config.schema import Config
from halos.errors import UserError
from halos.models.load import load_tokenizer

log = logging.getLogger(__name__)


def refuse_mismatched_adapter(config: Config, base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for an adapter of another base or tokenizer, whose weights would be meaningless here."""
    if config.peft.name != "lora" or config.peft.init_from is None:
        return
    adapter = Path(config.peft.init_from)
    chain = lineage.of_adapter(adapter)
    if chain is not None:
        lineage.refuse_other_base(chain, base, f"peft.init_from={adapter}", Path(config.cache_dir).expanduser())
    else:
        _compare_names(config, adapter, base)
    _refuse_other_tokenizer(adapter, tokenizer)


def _compare_names(config: Config, adapter: Path, base: Path) -> None:
    """Compare by the name of the base: an adapter without a lineage records nothing else."""
    named = str(confined.load_object(adapter / "adapter_config.json").get("base_model_name_or_path") or "")
    cache = Path(config.cache_dir).expanduser()
    if not named or named in (config.model.name_or_path, str(base)):
        return
    named_directory = Path(named)
    if not any(named_directory.glob("*.safetensors")):
        log.warning("peft.init_from=%s names %s as its base; whether %s is the same cannot be checked", adapter, named, base)
    elif lineage.identity(named_directory, cache) != lineage.identity(base, cache):
        raise UserError(f"peft.init_from={adapter} was trained on {named}, whose weights are not those of {base}")


def _refuse_other_tokenizer(adapter: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare with the tokenizer saved with the adapter: in its directory, or next to it in FINAL or in a checkpoint."""
    real = adapter.resolve()
    directories = (real, real.parent / "tokenizer", real.parent)
    directory = next((each for each in directories if (each / "tokenizer.json").is_file()), None)
    if directory is None:
        return
    theirs, ours = load_tokenizer(directory, add_tokens=[])[0].get_vocab(), tokenizer.get_vocab()
    if other := sorted(token for token, number in theirs.items() if ours.get(token) != number):
        raise UserError(
            f"peft.init_from={adapter} was trained with another tokenizer: {len(other)} of its {len(theirs)} tokens"
            f" differ here, such as {other[0]!r}. Use the base and the model.add_tokens that it was trained with, in their order"
        )
