"""LoRA targets in mixtures of experts, where PEFT would convert the names."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from halos.errors import UserError
from halos.models import adapter, targets
from tests.mixtures import FAMILIES, SIZES

SETTINGS = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": "all-linear", "target_parameters": [], "bias": "none",
            "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": []}  # fmt: skip
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
SHARED = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}


def mixture(family: str) -> Any:
    config = getattr(transformers, f"{family}Config")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(**{**SIZES, **FAMILIES.get(family, SHARED), "vocab_size": 50}))


def attached(family: str, **settings: Any) -> Any:
    return adapter.attach(mixture(family), {**SETTINGS, **settings}, base="base", reward=None, seed=0)


def changed(model: Any) -> set[str]:
    """Return what is trained: layers by their last name, parameters with their module's."""
    found = set()
    for name, module in model.named_modules():
        if hasattr(module, "parameter_name"):
            path = [part for part in name.split(".") if part != "base_layer"]
            found.add(path[-1] if module.parameter_name == "weight" else f"{path[-1]}.{module.parameter_name}")
        elif hasattr(module, "lora_A"):
            found.add(name.rpartition(".")[2])
    return found


@pytest.mark.parametrize(("family", "wanted"), [
    ("Mixtral", ATTENTION), ("Qwen3Moe", ATTENTION), ("Olmoe", ATTENTION), ("DeepseekV3", LATENT | MLP),
    ("Qwen2Moe", ATTENTION | MLP),
])  # fmt: skip
def test_all_linear_adapts_shared_experts_and_neither_experts_nor_routers(family: str, wanted: set[str]) -> None:
    """PEFT's own all-linear trains the router and the experts, these with twice the rank, and no shared expert."""
    model = attached(family)
    assert changed(model) == wanted
    (said, alone) = targets.lines(model)
    assert said.endswith(" is not adapted")
    assert "; the router (gate" in said
    assert alone == "the experts are not adapted: peft.target_parameters=[experts.gate_up_proj,experts.down_proj] adapts them too"


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_adapted_where_they_are_named_and_the_router_is_not(family: str) -> None:
    both = ["experts.gate_up_proj", "experts.down_proj"]
    model = attached(family, target_parameters=both, target_modules=["o_proj"])
    assert changed(model) == {"o_proj", *both}
    assert all(config == 2 for module in model.modules() if hasattr(module, "lora_A") for config in module.r.values())
    assert len(targets.lines(model)) == 1


def test_a_router_is_adapted_where_it_is_named() -> None:
    for named in ({"target_modules": ["gate"]}, {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}):
        model = attached("Mixtral", **named)
        assert changed(model) == {"gate"}
        assert targets.lines(model)[0] == "on mlp.gate"


def test_a_layer_adapted_by_its_weight_has_the_rank_of_its_pattern() -> None:
    model = attached("DeepseekV3", rank_pattern={"shared_experts.down_proj": 5}, alpha_pattern={"shared_experts.down_proj": 10})
    shared = model.get_base_model().model.layers[1].mlp.shared_experts
    assert (shared.down_proj.r["default"], shared.down_proj.scaling["default"]) == (5, 2.0)
    assert shared.up_proj.r["default"] == 2


@pytest.mark.parametrize(("settings", "message"), [
    ({"target_modules": ["q_proj", "w1"]}, r"w1 is no layer.*target_parameters=\[experts.gate_up_proj,experts.down_proj\]"),
    ({"target_parameters": ["experts.up_proj"]}, r"no parameter's name ends in experts.up_proj.*experts.gate_up_proj"),
    ({"target_modules": None}, "say which layers"),
])  # fmt: skip
def test_names_that_match_nothing_are_refused_with_the_existing_ones(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attached("Mixtral", **settings)


def test_dropout_and_dora_are_refused_for_layers_adapted_by_weight() -> None:
    for key, value in (("lora_dropout", 0.1), ("use_dora", True)):
        with pytest.raises(UserError, match=rf"peft.{key}={value}: PEFT adapts down_proj, gate_proj, up_proj of Deepseek"):
            attached("DeepseekV3", **{key: value})
        attached("DeepseekV3", target_modules=["o_proj"], **{key: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_is_loaded_by_halos_and_by_peft(family: str, tmp_path: Path) -> None:
    settings = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = attached(family, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(str(tmp_path))
    again = attached(family, **settings)
    adapter.refuse_different_settings(again, tmp_path)
    adapter.load_adapter(again, tmp_path)
    theirs = peft.PeftModel.from_pretrained(mixture(family), str(tmp_path))
    ids = torch.randint(3, 50, (1, 12))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, wanted)
        assert torch.equal(theirs(input_ids=ids).logits, wanted)
        assert not torch.equal(mixture(family)(input_ids=ids).logits, wanted)


def test_convolutions_are_no_experts_and_their_neighbours_no_routers() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    lfm = transformers.Lfm2Config(**sizes, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    jamba = transformers.JambaConfig(**sizes, num_key_value_heads=2, num_experts=4, use_mamba_kernels=False, mamba_d_state=8)
    with torch.device("meta"):
        dense, mixture = (transformers.AutoModelForCausalLM.from_config(config) for config in (lfm, jamba))
    assert not targets.stacks(dense)
    assert not targets.routers(dense)
    assert targets.experts(mixture) == ["experts.gate_up_proj", "experts.down_proj"]
    left = {name.rpartition(".")[2] for name in targets.resolve(mixture, "all-linear", []).modules or []}
    assert {"in_proj", "x_proj", "out_proj"} <= left
    assert "dt_proj" not in left  # whose weight the layer reads by itself
