"""Merge an adapter and prove the result: used by FINAL, by checkpoints' exports and by the checks before a run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from peft import PeftConfig
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from halos.confined import NO_CODE
from halos.errors import UserError, user_errors
from halos.logps.vocabulary import Vocabulary
from halos.merge import merge, proof
from halos.merge.probe import ProbeOutputs
from halos.merge.safetensors_io import SHARD, SafeFile
from halos.reward_kind import RewardKind


def case_of(
    base: Path,
    adapter: Path,
    vocabulary: Vocabulary,
    *,
    dtype: torch.dtype | None,
    reward: RewardKind | Literal["saved"] | None = "saved",
) -> proof.Case:
    """Return the inputs of a merge. `dtype` None keeps the base's; `reward` is read from the adapter, if that is saved."""
    if reward == "saved":
        with user_errors(f"{adapter}/adapter_config.json is not a PEFT configuration"):
            settings = PeftConfig.from_pretrained(str(adapter))
            _check_types(settings)
        reward = RewardKind.of_task(settings.task_type)
    with user_errors(f"{base}/config.json is not a configuration that transformers knows"):
        config = AutoConfig.from_pretrained(base, **NO_CODE)
    kind = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    size = max(vocabulary.size, config.get_text_config().vocab_size)
    return proof.Case(base, adapter, reward, kind, size, vocabulary.new)


def _check_types(settings: PeftConfig) -> None:
    """Raises TypeError if a value of the file is not a number: PEFT does not check."""
    for name in ("r", "lora_alpha"):
        if type(getattr(settings, name, 1)) not in (int, float):
            raise TypeError(f"{name} is {getattr(settings, name)!r}, not a number")
    for name in ("rank_pattern", "alpha_pattern"):
        values = getattr(settings, name, None) or {}
        if not isinstance(values, dict) or not all(type(value) in (int, float) for value in values.values()):
            raise TypeError(f"{name} is {values!r}, not a mapping of names to numbers")


def vocabulary_of(base: Path, adapter: Path, tokenizer: Path, added: Sequence[str] | None) -> Vocabulary:
    """Return a saved adapter's vocabulary: its own record; for an adapter that is older than such records, from the tokens that
    its run `added` and its base lacks, by the `tokenizer` directory.

    Raises UserError where ids are new, and neither a record nor the adapter's own tables give the initial values of their rows.
    """
    saved = Vocabulary.load(adapter)
    if saved is not None or not (tokenizer / "tokenizer.json").is_file():
        return saved or Vocabulary()
    current = read_tokenizer(tokenizer)
    if added is not None:
        known = read_tokenizer(base).get_vocab()
        return Vocabulary.of(current, [token for token in added if token not in known])
    with user_errors(f"{base}/config.json is not a configuration that transformers knows"):
        rows = AutoConfig.from_pretrained(base, **NO_CODE).get_text_config().vocab_size
    file = SafeFile(adapter / "adapter_model.safetensors")
    tables = [name for name in file.names if ".lora_" not in name and file.shape(name)[0] >= len(current)]
    if len(current) > rows and not tables:
        raise UserError(
            f"{tokenizer} has {len(current)} tokens and {base} has rows for {rows}: {adapter} does not record the initial"
            " values of the other rows"
        )
    return Vocabulary(len(current))


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    with user_errors(f"{directory}: its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(directory, **NO_CODE)
    assert tokenizer is not None
    return tokenizer


def merge_and_prove(
    case: proof.Case,
    output: Path,
    hashes: Callable[[Path], dict[str, str]],
    *,
    model: PreTrainedModel | None = None,
    shard: int = SHARD,
    live: ProbeOutputs | None = None,
) -> proof.Proof:
    """Merge into `output`, prove it, and write merge_report.json with the `hashes` of base, adapter and result.

    `model` is the trained model and `live` its outputs, if there are any. If the proof does not hold, the merged weights are
    removed.
    """
    try:
        facts = merge.merge(
            case.base, case.adapter, output, model=model or case.empty_model(), dtype=case.dtype, vocabulary=case.vocabulary,
            tokens=case.tokens, shard=shard,
        )  # fmt: skip
        result = proof.prove(case, output, live)
    except BaseException:
        _remove_weights(output)
        raise
    directories = {"base": case.base, "adapter": case.adapter, "merged": output}
    facts |= {
        "dtype": str(case.dtype).removeprefix("torch."),
        "sha256": {name: hashes(path) for name, path in directories.items()},
    }
    proof.write_report(output / "merge_report.json", result, facts)
    if not result.holds:
        _remove_weights(output)
    return result


def _remove_weights(output: Path) -> None:
    for file in [*output.glob("*.safetensors*"), output / "config.json"]:
        file.unlink(missing_ok=True)
