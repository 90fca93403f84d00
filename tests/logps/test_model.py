"""Our log-probs against each architecture's own logits: packed or alone, with bias, soft-capping, scale or adapter."""

from functools import partial
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor

from halos.data.collate import pack
from halos.errors import UserError
from halos.examples import Completion
from halos.logps import head
from halos.logps.attention import SEGMENTS, register
from halos.logps.model import LanguageModel, RewardModel, plainly
from halos.logps.modes import Modes, adapter_off
from halos.models import adapter

VOCABULARY, PROMPT = 300, 4
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY,
         "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GQA: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": GQA,
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": GQA,
    "Mistral": {**GQA, "sliding_window": 8},
    "Gemma": GQA,
    "Gemma2": {**GQA, "sliding_window": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "Gemma3Text": {**GQA, "sliding_window": 8},
    "GPTNeoX": {},
    "GPT2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "Phi3": {"num_key_value_heads": 2},
    "Cohere": {"num_key_value_heads": 2, "logit_scale": 0.3},
    "Granite": {"num_key_value_heads": 2, "logits_scaling": 4.0},
    "GptOss": {**GQA, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8},  # attention sinks
    "HyperCLOVAX": {"num_key_value_heads": 2, "logits_scaling": 0.25},  # multiplied, where Granite divides
    "ModernBertDecoder": {"local_attention": 8},  # a transform stands before its last layer
    "Mixtral": {**GQA, "num_local_experts": 4},
}
HYBRID: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 32, "mamba_n_heads": 8,
                          "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}  # fmt: skip
ALONE: dict[str, dict[str, Any]] = {
    "Lfm2": {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
    "GraniteMoeHybrid": {**HYBRID, "layer_types": ["mamba", "attention"], "num_key_value_heads": 2},
    "Falcon": {"alibi": True, "num_kv_heads": 4},  # attention of its own, as old architectures have
    "Llama4Text": {**GQA, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 96},  # chunks by a mask
    "RecurrentGemma": {"block_types": ["recurrent", "attention"], "num_key_value_heads": 1, "lru_width": 64,
                       "logits_soft_cap": 3.0},
    "xLSTM": {"num_heads": 4},
}  # fmt: skip


def build(name: str, *, reward: bool = False) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **(ARCHITECTURES | ALONE)[name]}, num_labels=1)
    register()
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    model = auto.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # biases and norms start at constants that hide mistakes
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def sequences(lengths: tuple[int, ...] = (9, 30, 17)) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths]


def packed(rows: list[np.ndarray]) -> Any:
    return pack([(ids[:PROMPT], Completion(ids[PROMPT:], np.ones(len(ids) - PROMPT, bool))) for ids in rows])


@torch.no_grad()
def own(model: Any, ids: np.ndarray) -> Tensor:
    """The completion's log-probs by the model's own forward, one sequence at a time."""
    model.set_attn_implementation("eager")
    logits = model(torch.tensor(ids[None], dtype=torch.long), use_cache=False).logits[0].double().log_softmax(-1)
    model.set_attn_implementation(SEGMENTS)
    return logits[torch.arange(PROMPT - 1, len(ids) - 1), torch.tensor(ids[PROMPT:], dtype=torch.long)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_log_probs_are_the_models_own(name: str) -> None:
    model, rows = build(name), sequences()
    wanted = [own(model, ids) for ids in rows]
    found = LanguageModel(model)(packed(rows))
    assert found.mask.sum(-1).tolist() == [len(ids) - PROMPT for ids in rows]
    for row, truth in enumerate(wanted):
        assert (found.values[row][found.mask[row]].double() - truth).abs().max() < 1e-5


@pytest.mark.parametrize("name", ALONE)
def test_sequences_that_cannot_be_packed_go_one_at_a_time(name: str) -> None:
    model, rows = build(name), sequences()
    wanted = [own(model, ids) for ids in rows]
    module = LanguageModel(model)
    assert not module.plan.is_packed
    found = module(packed(rows))
    for row, truth in enumerate(wanted):
        assert (found.values[row][found.mask[row]].double() - truth).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2"])
def test_a_neighbouring_sequence_changes_nothing(name: str) -> None:
    model, rows = LanguageModel(build(name)), sequences()
    before = model(packed(rows)).values[1].detach()
    rows[0] = (rows[0] + 7) % VOCABULARY
    assert torch.equal(before, model(packed(rows)).values[1])


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPTNeoX"])
def test_chunks_of_the_head_give_the_gradient_of_full_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = build(name), sequences()
    gradients = []
    for at_once in (head.LOGITS_AT_ONCE, 7 * VOCABULARY):
        monkeypatch.setattr(head, "LOGITS_AT_ONCE", at_once)
        model.zero_grad()
        LanguageModel(model)(packed(rows)).sum.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item() < 5e-6


def test_no_prompt_token_reaches_the_head() -> None:
    model, rows = build("Llama"), sequences()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0]))
    LanguageModel(model)(packed(rows))
    assert sum(seen) == sum(len(ids) - PROMPT for ids in rows)


def lora(model: Any, **settings: Any) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def test_adapter_off_is_the_base_and_leaves_every_flag_as_it_was() -> None:
    model, rows = build("Llama"), sequences()
    base = LanguageModel(model)(packed(rows)).values.detach()
    adapted = LanguageModel(lora(model))
    trained = [p.requires_grad for p in adapted.parameters()]
    on = adapted(packed(rows)).values.detach()
    with adapter_off(adapted):
        assert torch.equal(adapted(packed(rows)).values, base)
    assert torch.equal(adapted(packed(rows)).values, on)
    assert not torch.allclose(on, base)
    assert [p.requires_grad for p in adapted.parameters()] == trained


def test_a_model_is_switched_as_by_its_own_train_and_eval() -> None:
    adapted, seen = LanguageModel(lora(build("Llama"))), list[bool]()
    modes, parts = Modes(adapted), [*adapted.modules()]
    for mode in (True, False):
        modes.train(mode)
        with modes.evaluating():
            assert not any(part.training for part in parts)
        assert {part.training for part in parts} == {mode}

    class Own(torch.nn.Linear):
        def train(self, mode: bool = True) -> "Own":
            seen.append(mode)
            return super().train(mode)

    assert modes.is_current
    adapted.more = Own(1, 1)
    assert not modes.is_current
    with Modes(adapted).evaluating():
        assert seen == [False], "it does more than set its flag"
    adapted.more = torch.nn.Dropout()
    adapted.more.train = lambda mode=True: seen.append(mode)  # type: ignore[assignment]
    with Modes(adapted).evaluating():
        assert seen[2:] == [False], "of this module alone"


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_the_bases_own_with_the_adapter_off(bias: str) -> None:
    model, rows = build("Qwen2"), sequences()
    base = LanguageModel(model)(packed(rows)).values.detach()
    settings = {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", "bias": bias,
                "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [],
                "target_parameters": []}  # fmt: skip
    adapted = LanguageModel(adapter.attach(model, settings, base="", reward=None, seed=0))
    trained = {name: parameter for name, parameter in adapted.named_parameters() if name.endswith(".bias")}
    for parameter in trained.values():
        assert parameter.requires_grad
        parameter.data += 0.5
    values = {name: parameter.detach().clone() for name, parameter in trained.items()}
    on = adapted(packed(rows)).values.detach()
    with adapter_off(adapted):
        assert torch.equal(adapted(packed(rows)).values, base)
    assert torch.equal(adapted(packed(rows)).values, on)
    assert not torch.allclose(on, base)
    assert all(torch.equal(parameter, values[name]) for name, parameter in trained.items())


def test_an_adapter_on_the_head_counts() -> None:
    model, rows = build("Llama"), sequences()
    adapted = lora(model, modules_to_save=["lm_head"])
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    wanted = own(adapted.get_base_model(), rows[1])
    found = LanguageModel(adapted)(packed(rows))
    assert (found.values[1][found.mask[1]].double() - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "GPTNeoX", "GPT2"])
@pytest.mark.parametrize("ends_in_padding", [False, True])
def test_scores_are_read_where_transformers_reads_them(name: str, ends_in_padding: bool) -> None:
    model, rows = build(name, reward=True), sequences()
    if ends_in_padding:  # as where pad == eos
        rows = [np.append(ids, SIZES["pad_token_id"]).astype(np.int32) for ids in rows]
    with torch.no_grad():
        wanted = [model(torch.tensor(ids[None], dtype=torch.long)).logits[0, 0].item() for ids in rows]
        model.set_attn_implementation(SEGMENTS)
        assert RewardModel(model)(packed(rows)).tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_model_in_training_generates_as_it_would_alone_and_its_refusal_says_how() -> None:
    model, ids = build("Llama"), torch.tensor([[5, 6, 7, 8]])
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.set_attn_implementation(SEGMENTS)
    for call in (model, partial(model.generate, max_new_tokens=6, do_sample=False)):
        with pytest.raises(UserError, match=r"with halos\.logps\.model\.plainly"):
            call(ids)
    with plainly(model):
        assert model.generate(ids, max_new_tokens=6, do_sample=False).tolist() == wanted.tolist()
    assert model.config._attn_implementation == SEGMENTS
