"""How an architecture's log-probs are computed is decided by trying, not by its name or a flag."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from halos.errors import UserError
from halos.logps import hidden, miniature, plan
from halos.logps.attention import SEGMENTS
from halos.logps.model import LanguageModel
from halos.logps.reference_values import UNSHARDED
from halos.reward_kind import RewardKind

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
         "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def config(name: str, **settings: Any) -> transformers.PretrainedConfig:
    return getattr(transformers, f"{name}Config")(**{**SIZES, **settings})


def planned(name: str, *, reward: RewardKind | None = None, longest: int | None = None, **settings: Any) -> plan.ForwardPlan:
    return plan.plan_for(config(name, **settings), reward=reward, attention=SEGMENTS, longest=longest)


def miniature_of(name: str, **settings: Any) -> Any:
    return miniature.build(transformers.AutoModelForCausalLM, miniature.small_config(config(name, **settings), longest=None))


def test_an_encoder_is_refused_since_it_reads_what_it_would_predict() -> None:
    with pytest.raises(UserError, match="depends on the tokens after it"):
        planned("Bert", num_attention_heads=4)
    assert planned("Bert", is_decoder=True, num_attention_heads=4).head == "own"  # a transform before the last layer


def test_what_transformers_itself_cannot_run_is_one_message() -> None:
    with pytest.raises(UserError, match="llama is not supported: transformers' own code for it fails"):
        planned("Llama", num_key_value_heads=3)


def test_rotary_embeddings_that_change_with_the_longest_row_pack_only_where_no_row_is_so_long() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    settings: dict[str, Any] = {"num_key_value_heads": 2, "max_position_embeddings": 512, "original_max_position_embeddings": 64}
    settings["rope_parameters"] = {**rope, "original_max_position_embeddings": 64}
    assert planned("Phi3", longest=64, **settings).is_packed
    assert not planned("Phi3", longest=65, **settings).is_packed


def test_scores_are_packed_or_the_models_own_one_row_at_a_time() -> None:
    assert planned("Llama", reward=RewardKind.OUTCOME) == plan.ForwardPlan(SEGMENTS, "layer", shares=True)
    assert planned("Falcon", reward=RewardKind.OUTCOME, num_kv_heads=4).attention is None
    assert planned("OPT", reward=RewardKind.OUTCOME, ffn_dim=96, word_embed_proj_dim=64).head in ("layer", "whole")


@pytest.mark.parametrize("into", ["any sequence", "a later branch"])
def test_a_leak_too_small_for_any_tolerance_is_a_leak(into: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hidden._packed

    def leaking(backbone: Any, attention: str, batch: Any) -> Tensor:
        states, (trunk, *branches) = real(backbone, attention, batch), batch.trees[0]
        if into == "any sequence":
            return states + 1e-9 * states.mean()
        if not branches:
            return states
        end = trunk + branches[0]
        return torch.cat([states[:end], states[end:] + 1e-9 * states[trunk:end].mean()])

    monkeypatch.setattr(hidden, "_packed", leaking)
    plan._plan.cache_clear()
    try:
        found = planned("Llama")
        assert found.why == ("one row would read another" if into == "any sequence" else None)
        assert not found.shares
    finally:
        plan._plan.cache_clear()


def test_attention_that_counts_from_the_first_token_of_a_batch_or_reads_few_keys_is_not_packed() -> None:
    """The limits of both are far above the sequences of the trial."""
    sizes: dict[str, Any] = {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
    }
    assert not planned("Llama4Text", longest=1024, intermediate_size_mlp=96, **sizes).is_packed
    sparse = {"index_n_heads": 2, "index_head_dim": 16, "rotary_dim": 16, "dense_intermediate_size": 96}
    for kind in ("minimax_m3_sparse", "full_attention"):
        found = planned("MiniMaxM3VLText", layer_types=[kind] * 4, **sizes, **sparse)
        assert found.is_packed == (kind == "full_attention")


def test_a_miniature_has_one_layer_of_each_kind_whatever_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    made = miniature_of("Qwen3", num_hidden_layers=5, layer_types=kinds, sliding_window=64, use_sliding_window=True,
                        num_key_value_heads=2)  # fmt: skip
    assert [layer.self_attn.sliding_window for layer in made.model.layers] == [None, miniature.WINDOW]
    assert made.config.layer_types == ["full_attention", "sliding_attention"]
    monkeypatch.setattr(miniature, "LARGE", 0)  # no configuration says: the first of five, and the fourth
    made = miniature_of("DeepseekV3", num_hidden_layers=5, first_k_dense_replace=3, n_routed_experts=4, num_experts_per_tok=2,
                        n_group=1, topk_group=1, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
                        v_head_dim=16, num_key_value_heads=4, moe_intermediate_size=32)  # fmt: skip
    layers = made.model.layers  # a dense one, and one with experts
    assert [type(layer.mlp).__name__ for layer in layers] == ["DeepseekV3MLP", "DeepseekV3MoE"]
    with torch.no_grad():
        assert made(input_ids=miniature.row(12)[None]).logits.isfinite().all()


def test_ranks_call_their_layers_equally_often_and_no_number_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config("Lfm2", layer_types=["conv", "full_attention"], num_key_value_heads=2)
    )
    module, calls = LanguageModel(model.eval()), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append("layer"))
    batch = miniature.sequences([torch.arange(5, 12), torch.arange(20, 25)])
    results = []

    def all_reduce(most: torch.Tensor, _: Any) -> None:  # another rank has five rows
        calls.append("all-reduce")
        most.fill_(5)

    monkeypatch.setattr(hidden.dist, "all_reduce", all_reduce)
    for module.layout in (UNSHARDED, SimpleNamespace(is_sharded=True)):
        module.zero_grad()
        calls.clear()
        values = module(batch).values
        values.sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        results.append((list(calls), values.detach(), gradients))
    assert results[0][0] == ["layer"] * 2
    assert results[1][0] == ["all-reduce"] + ["layer"] * 5  # before the layers, which have collectives of their own
    assert torch.equal(results[0][1], results[1][1])
    assert torch.allclose(results[0][2], results[1][2], atol=1e-7)
