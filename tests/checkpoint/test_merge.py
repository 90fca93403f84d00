"""A merged model is the adapter model, for every kind of LoRA that is covered; the rest is refused by name."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from halos.checkpoint import merge, proof
from halos.checkpoint.handover import compared
from halos.errors import UserError

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
         "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2, "attention_bias": True},
    "Qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "GPTNeoX": {},
    "GPT2": {},
    "Gemma": {"num_key_value_heads": 2, "head_dim": 16},
    "Mistral": {"num_key_value_heads": 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
}


def base(name: str, directory: Path, *, reward: bool = False, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Any:
    """A random model with biases that are not zero, saved as a base, and loaded again with its head."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **ARCHITECTURES[name])
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    if not reward:
        return model
    return transformers.AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1)


def adapted(model: Any, **settings: Any) -> Any:
    """With an adapter whose every tensor was moved away from where it starts."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **settings}
    found = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in found.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return found


def merged(model: Any, directory: Path, *, reward: bool = False, dtype: torch.dtype = torch.float32) -> proof.Proof:
    model.save_pretrained(str(directory / "adapter"), save_embedding_layers=False)
    output = directory / "merged"
    output.mkdir()
    merge.merge(directory / "base", directory / "adapter", output, model=model.get_base_model(), dtype=dtype)
    if dtype is not torch.float32:
        return compared(directory / "base", directory / "adapter", output, reward=reward, dtype=dtype, vocabulary=300)
    ids = proof.probe(SIZES["vocab_size"])
    with torch.no_grad():
        truth = torch.cat([model(input_ids=row[None]).logits for row in ids])
    return proof.prove(output, ids, truth, reward=reward, dtype=dtype)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_model_is_the_adapter_model(name: str, variant: str, tmp_path: Path) -> None:
    model = adapted(base(name, tmp_path / "base"), **VARIANTS[variant])
    result = merged(model, tmp_path)
    assert result.holds, str(result)
    with torch.no_grad(), model.disable_adapter():
        ids = proof.probe(SIZES["vocab_size"])
        untouched = proof.prove(tmp_path / "merged", ids, model(input_ids=ids).logits, reward=False, dtype=torch.float32)
    assert untouched.error > 1e-2, "the adapter does nothing, so that this test would pass without a merge"


def test_rank_and_alpha_patterns_are_the_adapters_own(tmp_path: Path) -> None:
    model = base("Llama", tmp_path / "base")
    result = merged(adapted(model, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 8}, alpha_pattern={"v_proj": 32}), tmp_path)
    assert result.holds, str(result)


def test_a_sharded_base_stays_sharded(tmp_path: Path) -> None:
    model = base("Llama", tmp_path / "base", shard="100KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    assert merged(adapted(model), tmp_path).holds
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == len(list((tmp_path / "base").glob("*.safetensors")))


def test_modules_saved_whole_replace_the_bases(tmp_path: Path) -> None:
    model = base("Llama", tmp_path / "base")
    result = merged(adapted(model, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]), tmp_path)
    assert result.holds, str(result)


def test_a_tied_head_that_was_trained_alone_is_untied(tmp_path: Path) -> None:
    model = base("Qwen2", tmp_path / "base")
    result = merged(adapted(model, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]), tmp_path)
    assert result.holds, str(result)


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "GPTNeoX", "GPT2"])
def test_a_merged_reward_model_keeps_its_trained_head_and_drops_the_lm_head(name: str, tmp_path: Path) -> None:
    model = adapted(base(name, tmp_path / "base", reward=True), task_type="SEQ_CLS")
    result = merged(model, tmp_path, reward=True)
    assert result.holds, str(result)
    assert "score.weight" in load_file(tmp_path / "merged" / "model.safetensors")


def test_a_half_precision_merge_rounds_once(tmp_path: Path) -> None:
    model = adapted(base("Llama", tmp_path / "base", dtype=torch.bfloat16))
    assert merged(model, tmp_path, dtype=torch.bfloat16).holds
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    delta = 6 / 4 * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    wanted = (layer.base_layer.weight.float() + delta).to(torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"], wanted)


def test_what_is_not_covered_is_refused_by_name(tmp_path: Path) -> None:
    model = adapted(base("Llama", tmp_path / "base"), target_modules=["embed_tokens"])
    with pytest.raises(UserError, match=r"embed_tokens.lora_embedding_A is not covered"):
        merged(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["alpha", "bias", "transposed", "layers swapped", "layer lost"])
def test_a_wrong_merge_fails_its_proof(fault: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(base("Llama", tmp_path / "base", dtype=dtype), bias="lora_only")
    assert merged(model, tmp_path, dtype=dtype).holds
    path = tmp_path / "merged" / "model.safetensors"
    tensors, original = load_file(path), load_file(tmp_path / "base" / "model.safetensors")
    first, second = (f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))
    bias = "model.layers.0.self_attn.q_proj.bias"
    if fault == "alpha":
        for name in tensors:
            tensors[name] = (original[name] + 1.5 * (tensors[name].float() - original[name])).to(dtype)
    elif fault == "bias":
        tensors[bias] = original[bias]
    elif fault == "transposed":
        tensors[first] = tensors[first].T.contiguous()
    elif fault == "layers swapped":
        tensors[first], tensors[second] = tensors[second], tensors[first]
    else:
        del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    places = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    assert not compared(*places, reward=False, dtype=dtype, vocabulary=300).holds


def test_a_half_precision_reward_model_proves_itself(tmp_path: Path) -> None:
    base("Llama", tmp_path / "base", dtype=torch.bfloat16)
    reward = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, dtype=torch.bfloat16
    )
    result = merged(adapted(reward, task_type="SEQ_CLS"), tmp_path, reward=True, dtype=torch.bfloat16)
    assert result.holds, str(result)
