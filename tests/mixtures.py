"""Mixture-of-experts models of four families, two layers with random weights, with the bundled tokenizer."""

from pathlib import Path
from typing import Any

import torch
import transformers

from halos.models import tiny

SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 512, "num_experts_per_tok": 2, "initializer_range": 0.1}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, "norm_topk_prob": True},
    "Olmoe": {"num_experts": 4},
    "DeepseekV3": {"n_routed_experts": 4, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
                   "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                   "num_key_value_heads": 4},
}  # fmt: skip
EXPERTS = "peft.target_parameters=[experts.gate_up_proj,experts.down_proj]"


def build(family: str, directory: Path, *, fused: bool = False, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Save a model as on the hub, one tensor per expert; with `fused` as in memory, all experts in one tensor."""
    source = directory.parent / "words"
    tiny.build(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    kind = getattr(transformers, f"{family}Config")
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = kind(**{**SIZES, **FAMILIES.get(family, {}), **ends, "vocab_size": len(tokenizer), **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.float() + 0.05 * torch.randn(buffer.shape)  # in float32 whatever the dtype of the rest
    model.save_pretrained(directory, save_original_format=not fused)
    tokenizer.save_pretrained(directory)
    return directory
