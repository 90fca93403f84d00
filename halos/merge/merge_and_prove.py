"""Merge, prove and hand over: what the final save of a run and the commands have in common."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftConfig
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from halos.merge import merge, proof
from halos.merge.safetensors_io import SHARD


def case_of(base: Path, adapter: Path, words: Path, *, dtype: torch.dtype | None) -> proof.Case:
    """What there is to merge: `words` holds the tokenizer that was trained with. `dtype` None keeps the base's."""
    reward = PeftConfig.from_pretrained(str(adapter)).task_type == "SEQ_CLS"
    config = AutoConfig.from_pretrained(base)
    size, tokens = _vocabulary(base, words)
    kind = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    return proof.Case(base, adapter, reward, kind, max(size, config.get_text_config().vocab_size), tokens)


def _vocabulary(base: Path, words: Path) -> tuple[int, list[int]]:
    """How many ids the saved tokenizer has, and those of its tokens that the base's own does not know."""
    if not (words / "tokenizer.json").is_file():
        return 0, []
    now = Tokenizer.from_file(str(words / "tokenizer.json")).get_vocab()
    was = Tokenizer.from_file(str(base / "tokenizer.json")).get_vocab() if (base / "tokenizer.json").is_file() else now
    return len(now), sorted(number for token, number in now.items() if token not in was)


def combine(
    case: proof.Case,
    output: Path,
    hashes: Callable[[Path], dict[str, str]],
    *,
    model: PreTrainedModel | None = None,
    shard: int = SHARD,
    logits: Callable[[Tensor], Tensor] | None = None,
) -> proof.Proof:
    """Merge into `output`, prove it, and write merge_report.json with the `hashes` of all three.

    `model` is the trained model and `logits` its forward, where they are at hand. Where the proof does not hold, no merged
    weights are left behind.
    """
    try:
        facts = merge.merge(
            case.base, case.adapter, output, model=model or case.bare(), dtype=case.dtype, vocabulary=case.vocabulary,
            tokens=case.tokens, shard=shard,
        )  # fmt: skip
        result = proof.prove(case, output, logits)
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
