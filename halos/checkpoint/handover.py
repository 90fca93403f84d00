"""Merge what a run saved, at any step, into a directory that plain from_pretrained loads."""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from halos.checkpoint import merge, proof
from halos.checkpoint.commit import staged
from halos.errors import UserError

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab*", "merges.txt")


def merged(saved: Path, output: Path, dtype: torch.dtype | None) -> proof.Proof:
    """Merge the adapter of a checkpoint, of FINAL, or in a directory of its own; its proof.

    `dtype` None keeps the base's. Raises UserError where there is no adapter, its base is gone, or `output` exists; the
    caller decides about a proof that does not hold, and nothing is left at `output` then.
    """
    adapter = saved / "adapter" if (saved / "adapter").is_dir() else saved
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{saved} holds no adapter: there is nothing to merge")
    if output.exists():
        raise UserError(f"{output} exists already: name another --output")
    settings = PeftConfig.from_pretrained(str(adapter))
    base = Path(settings.base_model_name_or_path or "")
    if not isinstance(settings, LoraConfig) or not (base / "config.json").is_file():
        raise UserError(f"{adapter} was trained on {base}, which is not here: put its base back, or edit adapter_config.json")
    reward = settings.task_type == "SEQ_CLS"
    auto: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    config = AutoConfig.from_pretrained(base, **({"num_labels": 1} if reward else {}))
    kind = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    with staged(output, main=True, facts={"merged_from": str(saved)}) as path:
        with torch.device("meta"):
            bare = auto.from_config(config)
        facts = merge.merge(base, adapter, path, model=bare, dtype=kind)
        _copy_words(saved, path, base, reward=reward)
        result = compared(base, adapter, path, reward=reward, dtype=kind, vocabulary=config.get_text_config().vocab_size)
        proof.write_report(path / "merge_report.json", result, facts)
        if not result.holds:
            shutil.rmtree(path)
            raise UserError(f"the merged model is not the adapter's: {result}. Nothing was written")
    return result


def compared(base: Path, adapter: Path, path: Path, *, reward: bool, dtype: torch.dtype, vocabulary: int) -> proof.Proof:
    """The merged model at `path` against base and adapter, all three read from disk."""
    ids = proof.probe(vocabulary)
    truth = proof.adapter_logits(base, adapter, ids, reward=reward, dtype=torch.float32, vocabulary=vocabulary)
    noise = 0.0
    if dtype is not torch.float32:
        rounded = proof.adapter_logits(base, adapter, ids, reward=reward, dtype=dtype, vocabulary=vocabulary)
        noise = proof.distance(rounded, truth, half=True)
    return proof.prove(path, ids, truth, reward=reward, dtype=dtype, noise=noise)


def _copy_words(saved: Path, path: Path, base: Path, *, reward: bool) -> None:
    """Tokenizer and generation settings, as the run saved them."""
    source = saved / "tokenizer" if (saved / "tokenizer").is_dir() else saved
    for pattern in TOKENIZER:
        for file in source.glob(pattern):
            shutil.copy2(file, path / file.name)
    if not reward and (base / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(base).save_pretrained(path)
