"""Bases as they lie on disks and on the hub: whatever from_pretrained makes of their files, a merge makes of them too."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_merge import SIZES, VARIANTS, Variant, adapted, combined, make_base, said, trained

from halos.errors import UserError
from halos.logps.vocabulary import grow
from halos.merge import proof
from halos.merge.preflight import check_merge


def rewritten(base: Path, change: Any) -> None:
    path = base / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def reloaded(case: proof.Case, name: str, variant: Variant) -> Any:
    """The adapter model again, after what happened to its base's files."""
    model = case.auto.from_pretrained(case.base, dtype=torch.float32)
    grow(model, case.vocabulary, case.tokens)
    model = adapted(model, name, **variant.settings)
    model.save_pretrained(str(case.adapter), save_embedding_layers=False)
    return model


@pytest.mark.parametrize(("name", "prefix"), [("GPT2", "transformer."), ("Llama", "model."), ("GPTNeoX", "gpt_neox.")])
@pytest.mark.parametrize("variant", ["lora", "grown, both whole"])
def test_a_base_saved_as_a_backbone_merges_under_its_own_names(name: str, prefix: str, variant: str, tmp_path: Path) -> None:
    model, case = trained(tmp_path, name, VARIANTS[variant], tied=name == "GPT2")
    rewritten(case.base, lambda tensors: {key.removeprefix(prefix): value for key, value in tensors.items()})
    result = combined(case, tmp_path / "merged", live=said(model, case))
    assert result.holds, result.faults
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert load_file(case.base / "model.safetensors").keys() <= names


def test_the_file_that_from_pretrained_reads_is_merged_though_a_stale_index_stands_beside_it(tmp_path: Path) -> None:
    model, case = trained(tmp_path, "Llama", VARIANTS["lora"], tied=False)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (case.base / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"model.norm.weight": torch.zeros(64)}, case.base / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    assert combined(case, tmp_path / "merged", live=said(model, case)).holds


@pytest.mark.parametrize("variant", ["lora", "grown", "head whole"])
def test_a_config_that_ties_two_different_tables_is_merged_as_the_two_that_it_has(variant: str, tmp_path: Path) -> None:
    _, case = trained(tmp_path, "Qwen2", VARIANTS[variant], tied=True)
    other = torch.randn(SIZES["vocab_size"], SIZES["hidden_size"], generator=torch.Generator().manual_seed(5))
    rewritten(case.base, lambda tensors: {**tensors, "lm_head.weight": other})
    model = reloaded(case, "Qwen2", VARIANTS[variant])
    assert not torch.equal(model.get_base_model().get_output_embeddings().weight[:9], model.get_input_embeddings().weight[:9])
    result = combined(case, tmp_path / "merged", live=said(model, case))
    assert result.holds, result.faults
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_two_tensors_that_would_be_one_of_the_models_are_refused(tmp_path: Path) -> None:
    _, case = trained(tmp_path, "Llama", VARIANTS["lora"], tied=False)
    rewritten(case.base, lambda tensors: {**tensors, "norm.weight": tensors["model.norm.weight"] + 1})
    with pytest.raises(UserError, match=r"norm.weight, and both are the model's model.norm.weight"):
        combined(case, tmp_path / "merged")


@pytest.mark.parametrize(("vocabulary", "tokens"), [(307, (300, 301)), (0, (297, 299))])
def test_a_biased_head_grows_with_its_tokens(vocabulary: int, tokens: tuple[int, ...], tmp_path: Path) -> None:
    model, case = trained(tmp_path, "Phi", Variant(vocabulary=vocabulary, tokens=tokens), tied=False)
    result = combined(case, tmp_path / "merged", live=said(model, case))
    assert result.holds, result.faults
    merged, base = (load_file(place / "model.safetensors") for place in (tmp_path / "merged", case.base))
    old = min(tokens)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        assert torch.equal(merged[name][:old], base[name][:old])
        assert torch.allclose(merged[name][tokens[0]].double(), base[name][:old].double().mean(0), atol=1e-7)


@pytest.mark.parametrize("whole", [["self_attn"], ["model.layers.1"], ["mlp"]])
def test_whole_layers_that_are_trained_beside_the_adapter_are_merged(whole: list[str], tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj"] if whole == ["mlp"] else ["up_proj", "down_proj"]
    variant = Variant({"target_modules": targets, "modules_to_save": whole})
    model, case = trained(tmp_path, "Llama", variant, tied=False)
    result = combined(case, tmp_path / "merged", model=model.get_base_model(), live=said(model, case))
    assert result.holds, result.faults


def test_known_tokens_stay_the_bases_rows_bit_for_bit(tmp_path: Path) -> None:
    """A padded table, of whose rows some belong to tokens that only tokenizer_config.json names: a run knows that none is new."""
    model, case = trained(tmp_path, "Llama", VARIANTS["lora"], tied=False)
    case = replace(case, vocabulary=280, tokens=())
    assert combined(case, tmp_path / "merged", live=said(model, case)).holds
    merged, base = (load_file(place / "model.safetensors") for place in (tmp_path / "merged", case.base))
    assert all(torch.equal(merged[name], base[name]) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    shutil.rmtree(tmp_path / "merged")
    (tmp_path / "merged").mkdir()
    wrong = replace(case, tokens=(270, 271))  # as if they had been new
    result = combined(wrong, tmp_path / "merged", live=said(model, wrong))
    assert "log-probs from the trained model" in result.faults[0]


def test_phi_is_a_base_with_a_biased_head(tmp_path: Path) -> None:
    assert make_base("Phi", tmp_path / "base", tied=False).lm_head.bias is not None


@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_a_biased_head_that_is_trained_whole_keeps_its_own_bias_where_all_are_trained(whole: list[str], tmp_path: Path) -> None:
    """PEFT saves the bias of the head's untrained original beside its copy's."""
    model, case = trained(tmp_path, "Phi", Variant({"bias": "all", "modules_to_save": whole}), tied=False)
    assert any("original_module" in name for name in load_file(case.adapter / "adapter_model.safetensors"))
    result = combined(case, tmp_path / "merged", live=said(model, case))
    assert result.holds, result.faults
    trained_bias = model.get_base_model().lm_head.modules_to_save["default"].bias.detach()
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["lm_head.bias"], trained_bias)


def test_a_base_in_half_precision_is_rehearsed_with_tables_of_positions_as_fine_as_it_is_loaded_with(tmp_path: Path) -> None:
    config = transformers.GPTJConfig(vocab_size=300, n_embd=64, n_layer=1, n_head=4, rotary_dim=8, n_positions=64)
    transformers.GPTJForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
    model = adapted(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), "Llama")
    check_merge(proof.Case(tmp_path / "base", tmp_path / "adapter", None, torch.bfloat16), model)
