"""Limits of sequence length: a table of positions is recognised whatever an architecture calls it."""

from typing import Any

import pytest
import torch
import transformers

from halos.models.positions import Limits, limits, longest_allowed, smaller

WORDS = {"vocab_size": 50}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, **WORDS}
LEARNED: list[tuple[str, dict[str, Any]]] = [
    ("GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, **WORDS}),
    ("OPT", {**SIZES, "ffn_dim": 16, "word_embed_proj_dim": 16}),  # whose table has two rows more
    ("GPTJ", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "rotary_dim": 8, **WORDS}),  # sines in a buffer
    ("GPTBigCode", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, **WORDS}),
]
ROTARY: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {**SIZES, "intermediate_size": 16, "num_key_value_heads": 2}),
    ("GPTNeoX", {**SIZES, "intermediate_size": 16}),
]


def made(name: str, settings: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**settings))


@pytest.mark.parametrize(("name", "settings"), LEARNED)
def test_a_table_of_positions_is_a_hard_limit(name: str, settings: dict[str, Any]) -> None:
    assert limits(made(name, settings)) == Limits(64, 64)


@pytest.mark.parametrize(("name", "settings"), ROTARY)
def test_rotary_positions_have_no_hard_limit(name: str, settings: dict[str, Any]) -> None:
    assert limits(made(name, settings)) == Limits(64, None)


def test_the_tighter_limits_of_two_models_apply() -> None:
    both = smaller(Limits(64, None), Limits(32, 32))
    assert both == Limits(32, 32)
    assert (longest_allowed(both, 100), longest_allowed(both, 20), longest_allowed(Limits(64, None), 100)) == (32, 20, 100)
