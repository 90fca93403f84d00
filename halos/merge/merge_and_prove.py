"""Merge, prove and hand over: what the final save of a run and the commands have in common."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from halos.confined import NO_CODE
from halos.errors import UserError, user_errors
from halos.logps.vocabulary import Vocabulary
from halos.merge import merge, proof
from halos.merge.safetensors_io import SHARD, SafeFile
from halos.merge.trained import Trained


def case_of(
    base: Path, adapter: Path, vocabulary: Vocabulary, *, dtype: torch.dtype | None, reward: bool | None = None
) -> proof.Case:
    """What there is to merge. `dtype` None keeps the base's; `reward` None leaves it to the adapter, which else need not be there
    yet."""
    if reward is None:
        with user_errors(f"{adapter}/adapter_config.json is none of PEFT's"):
            settings = PeftConfig.from_pretrained(str(adapter))
            _check_kinds(settings)
        reward = settings.task_type == "SEQ_CLS"
    with user_errors(f"{base}/config.json is none that transformers knows"):
        config = AutoConfig.from_pretrained(base, **NO_CODE)
    kind = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    size = max(vocabulary.size, config.get_text_config().vocab_size)
    return proof.Case(base, adapter, reward, kind, size, vocabulary.new)


def _check_kinds(settings: PeftConfig) -> None:
    """Raises TypeError where a number is none: PEFT takes what the file says."""
    for name in ("r", "lora_alpha"):
        if type(getattr(settings, name, 1)) not in (int, float):
            raise TypeError(f"{name} is {getattr(settings, name)!r}, no number")
    for name in ("rank_pattern", "alpha_pattern"):
        values = getattr(settings, name, None) or {}
        if not isinstance(values, dict) or not all(type(value) in (int, float) for value in values.values()):
            raise TypeError(f"{name} is {values!r}, no numbers by name")


def vocabulary_of(base: Path, adapter: Path, words: Path, added: Sequence[str] | None) -> Vocabulary:
    """What an adapter that was saved knows of its ids: its own record. Else, of one that was saved before there was any, the
    tokens that its run `added` and its base does not know, by the tokenizer of `words`.

    Raises UserError where ids are new, and neither a record nor the adapter's own tables tell what their rows started as.
    """
    saved = Vocabulary.load(adapter)
    if saved is not None or not (words / "tokenizer.json").is_file():
        return saved or Vocabulary()
    now = _tokenizer(words)
    if added is not None:
        known = _tokenizer(base).get_vocab()
        return Vocabulary.of(now, [token for token in added if token not in known])
    with user_errors(f"{base}/config.json is none that transformers knows"):
        rows = AutoConfig.from_pretrained(base, **NO_CODE).get_text_config().vocab_size
    file = SafeFile(adapter / "adapter_model.safetensors")
    tables = [name for name in file.names if ".lora_" not in name and file.shape(name)[0] >= len(now)]
    if len(now) > rows and not tables:
        raise UserError(
            f"{words} has a tokenizer of {len(now)} tokens and {base} rows for {rows}: {adapter} does not say what the"
            " rows of the others started as"
        )
    return Vocabulary(len(now))


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    with user_errors(f"{directory}: its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(directory, **NO_CODE)
    assert tokenizer is not None
    return tokenizer


def combine(
    case: proof.Case,
    output: Path,
    hashes: Callable[[Path], dict[str, str]],
    *,
    model: PreTrainedModel | None = None,
    shard: int = SHARD,
    live: Trained | None = None,
) -> proof.Proof:
    """Merge into `output`, prove it, and write merge_report.json with the `hashes` of all three.

    `model` is the trained model, and `live` what it said, where they are at hand. Where the proof does not hold, no merged
    weights are left behind.
    """
    try:
        facts = merge.merge(
            case.base, case.adapter, output, model=model or case.bare(), dtype=case.dtype, vocabulary=case.vocabulary,
            tokens=case.tokens, shard=shard,
        )  # fmt: skip
        result = proof.prove(case, output, live)
    except BaseException:
        _withdraw(output)
        raise
    places = {"base": case.base, "adapter": case.adapter, "merged": output}
    facts |= {
        "dtype": str(case.dtype).removeprefix("torch."),
        "sha256": {name: hashes(at) for name, at in places.items()},
    }
    proof.write_report(output / "merge_report.json", result, facts)
    if not result.holds:
        _withdraw(output)
    return result


def _withdraw(output: Path) -> None:
    for file in [*output.glob("*.safetensors*"), output / "config.json"]:
        file.unlink(missing_ok=True)
