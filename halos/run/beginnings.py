"""Whether an adapter that a run begins with (peft.init_from) was trained on what the run puts it on."""

import logging
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from halos import confined
from halos.checkpoint import lineage
from halos.config.schema import Config
from halos.errors import UserError
from halos.models.load import load_tokenizer

log = logging.getLogger(__name__)


def refuse_other_start(config: Config, base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for an adapter of another base or of other tokens; its weights would mean something else."""
    if config.peft.name != "lora" or config.peft.init_from is None:
        return
    adapter = Path(config.peft.init_from)
    chain = lineage.of_adapter(adapter)
    if chain is not None:
        lineage.refuse_other_base(chain, base, f"peft.init_from={adapter}", Path(config.cache_dir).expanduser())
    else:
        _compare_names(config, adapter, base)
    _refuse_other_tokens(adapter, tokenizer)


def _compare_names(config: Config, adapter: Path, base: Path) -> None:
    """Of an adapter that came without a lineage nothing is known but where its base lay."""
    named = str(confined.load_object(adapter / "adapter_config.json").get("base_model_name_or_path") or "")
    cache = Path(config.cache_dir).expanduser()
    if not named or named in (config.model.name_or_path, str(base)):
        return
    there = Path(named)
    if not any(there.glob("*.safetensors")):
        log.warning("peft.init_from=%s says that its base was %s, and nothing shows that %s is the same", adapter, named, base)
    elif lineage.identity(there, cache) != lineage.identity(base, cache):
        raise UserError(f"peft.init_from={adapter} was trained on {named}, whose weights are others than those of {base}")


def _refuse_other_tokens(adapter: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer lies with the adapter, above it in FINAL, or beside it in a checkpoint."""
    places = (adapter, adapter.parent / "tokenizer", adapter.parent)
    place = next((each for each in places if (each / "tokenizer.json").is_file()), None)
    if place is None:
        return
    theirs, ours = load_tokenizer(place, add_tokens=[])[0].get_vocab(), tokenizer.get_vocab()
    if other := sorted(token for token, number in theirs.items() if ours.get(token) != number):
        raise UserError(
            f"peft.init_from={adapter} was trained with another tokenizer: {len(other)} of its {len(theirs)} tokens are not the"
            f" same here, such as {other[0]!r}. Give the base and the model.add_tokens that it was trained with, in their order"
        )
