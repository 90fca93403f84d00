"""LoRA on the experts of mixtures: merged into files as they are, loaded by plain from_pretrained, proved; faults are seen."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import expert_merge_faults
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from halos.checkpoint import lineage
from halos.checkpoint.weights import save_adapter
from halos.errors import UserError
from halos.merge import deviation, proof
from halos.merge.expected_experts import Factors
from halos.merge.experts import ExpertUpdates
from halos.merge.merge_and_prove import merge_and_prove
from halos.merge.preflight import check_merge
from halos.models import adapter
from tests.mixtures import FAMILIES, build

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
SETTINGS = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": "all-linear", "target_parameters": BOTH,
            "bias": "none", "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
            "modules_to_save": []}  # fmt: skip


def trained(directory: Path, family: str, *, dtype: torch.dtype = torch.float32, fused: bool = False, **settings: Any) -> Any:
    """A base, an adapter that was moved away from where it starts, and what there is to merge."""
    base = build(family, directory / "base", fused=fused, dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = adapter.attach(model, {**SETTINGS, **settings}, base=str(base), reward=None, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    save_adapter(directory / "adapter", model)
    (directory / "merged").mkdir()
    return model.eval(), proof.Case(base, directory / "adapter", None, dtype)


CELLS = {
    "both": {},
    "rslora and patterns": {
        "use_rslora": True,
        "rank_pattern": {"experts.down_proj": 3},
        "alpha_pattern": {"experts.down_proj": 9},
    },
    "one of two": {"target_parameters": BOTH[:1], "target_modules": ["o_proj"]},
    "the router too": {"target_parameters": [*BOTH, "mlp.gate.weight"], "target_modules": []},
}


TABLE = [(family, "both", dtype) for family in FAMILIES for dtype in (torch.float32, torch.bfloat16)]
TABLE += [(family, cell, torch.float32) for family in ("Mixtral", "DeepseekV3") for cell in list(CELLS)[1:]]


@pytest.mark.parametrize(("family", "cell", "dtype"), TABLE, ids=str)
def test_a_merged_mixture_is_what_peft_would_merge(family: str, cell: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, case = trained(tmp_path, family, dtype=dtype, **CELLS[cell])
    check_merge(case, model)
    result = merge_and_prove(case, tmp_path / "merged", lineage.hashes)
    assert result.holds, result.faults
    base, merged = (load_file(place / "model.safetensors") for place in (case.base, tmp_path / "merged"))
    assert base.keys() == merged.keys()  # an expert a tensor, as the files had it
    assert any(".experts.3." in name for name in merged)
    routers = [name for name in merged if name.endswith(("gate.weight", "e_score_correction_bias"))]
    changed = {
        name for name in routers if merged[name].dtype is not base[name].dtype or not torch.equal(merged[name], base[name])
    }
    assert changed == ({name for name in routers if name.endswith("weight")} if cell == "the router too" else set())
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    wanted = model.merge_and_unload().state_dict()
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value.float(), wanted[name].float(), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3"])
def test_files_that_hold_experts_as_memory_does_are_written_so(family: str, tmp_path: Path) -> None:
    model, case = trained(tmp_path, family, fused=True)
    check_merge(case, model)
    result = merge_and_prove(case, tmp_path / "merged", lineage.hashes)
    assert result.holds, result.faults
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / "merged" / "model.safetensors"))


# --- what is wrong ---------------------------------------------------------------------------------------------------


def _scaled(delta: torch.Tensor) -> torch.Tensor:
    return 1.3 * delta


def _one_missing(delta: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(delta[:1]), delta[1:]])


def _permuted(delta: torch.Tensor) -> torch.Tensor:
    return delta.roll(1, 0)


def _gate_for_up(delta: torch.Tensor) -> torch.Tensor:
    return torch.cat(delta.chunk(2, 1)[::-1], 1)


def _columns_together(delta: torch.Tensor, layer: Any) -> torch.Tensor:
    """B read as A is: an expert's columns together."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a, b = a.unflatten(0, (layer.num_experts, -1)), b.unflatten(1, (layer.num_experts, -1))
    return layer.scaling["default"] * torch.einsum("oer,eri->eoi", b, a)


FAULTS: dict[str, Callable[..., torch.Tensor]] = {
    "scaled": _scaled, "an expert's update missing": _one_missing, "experts permuted": _permuted, "gate for up": _gate_for_up,
    "B's columns together": _columns_together,
}  # fmt: skip


def spoil(model: Any, merged: Path, fault: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    """Write into `merged` what a merge with this fault would leave: the last layer's gate_up_proj gets another update."""
    layer = model.get_base_model().model.layers[-1].mlp.experts.base_layer
    delta = layer.get_delta_weight("default")
    wrong = fault(delta, layer) if fault is _columns_together else fault(delta)
    weight = layer.get_param().detach() + wrong.detach()
    tensors = load_file(merged / "model.safetensors")
    stacked = [name for name in tensors if "layers.1." in name and ".experts." in name]
    gates = [name for name in stacked if "gate_proj" in name or ".w1." in name]
    ups = [name for name in stacked if "up_proj" in name or ".w3." in name]
    for names, half in ((gates, weight.chunk(2, 1)[0]), (ups, weight.chunk(2, 1)[1])):
        for name in names:
            number = int(name.split(".experts.")[1].split(".")[0])
            tensors[name] = half[number].to(dtype).contiguous()
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def right(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, proof.Case, Path]:
    """A right merge, and the model that it is of."""
    place = tmp_path_factory.mktemp("right")
    model, case = trained(place, "Qwen3Moe", dtype=request.param)
    assert merge_and_prove(case, place / "merged", lineage.hashes).holds
    return model, case, place / "merged"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_expert_is_seen_in_its_tensors_and_in_what_the_model_says(
    fault: str, right: tuple[Any, proof.Case, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each proof alone: they share no source."""
    model, case, merged = right
    shutil.copytree(merged, tmp_path / "wrong")
    spoil(model, tmp_path / "wrong", FAULTS[fault], case.dtype)
    seen = proof.prove(case, tmp_path / "wrong")
    assert not seen.holds
    assert ".experts." in seen.faults[0]
    monkeypatch.setattr(deviation, "compare", lambda *_: ([], []))
    seen = proof.prove(case, tmp_path / "wrong")
    assert not seen.holds
    assert "difference of log-probs" in seen.faults[0]


def test_a_router_that_decides_otherwise_is_no_rounding(
    right: tuple[Any, proof.Case, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, case, merged = right
    shutil.copytree(merged, tmp_path / "wrong")
    tensors = load_file(tmp_path / "wrong" / "model.safetensors")
    name = "model.layers.1.mlp.gate.weight"
    tensors[name] = tensors[name].roll(1, 0)
    save_file(tensors, tmp_path / "wrong" / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(deviation, "compare", lambda *_: ([], []))
    faults = proof.prove(case, tmp_path / "wrong").faults
    assert any("difference of routes" in fault for fault in faults), faults


def test_an_adapter_of_other_experts_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    _, case = trained(tmp_path, "Mixtral")
    other = build("Mixtral", tmp_path / "other", num_local_experts=8)
    with pytest.raises(UserError, match=r"has 8 experts of \[\d+, \d+\], and its adapter of rank 2 is"):
        merge_and_prove(replace(case, base=other), tmp_path / "merged", lineage.hashes)
    assert not list((tmp_path / "merged").iterdir())


# --- before the first step -------------------------------------------------------------------------------------------


def both_give_updates_to_other_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = Factors._of
    monkeypatch.setattr(ExpertUpdates, "of", expert_merge_faults.of_the_next(ExpertUpdates.of))
    monkeypatch.setattr(Factors, "_of", lambda self, expert, *rows: delta(self, (expert + 1) % self.experts, *rows))


def alone(broken: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(ExpertUpdates, "of", broken(ExpertUpdates.of))


FORMULA, SMALL = "differs from its formula", "tried on a small model of the same architecture"
EARLY = {
    "its halves swapped": (alone(expert_merge_faults.with_its_halves_swapped), FORMULA),
    "other experts": (alone(expert_merge_faults.of_the_next), FORMULA),
    "columns together": (alone(expert_merge_faults.with_columns_together), FORMULA),
    "an expert in the middle": (alone(expert_merge_faults.without_the_second), SMALL),
    "both wrong": (both_give_updates_to_other_experts, SMALL),
}  # fmt: skip


@pytest.mark.parametrize("fault", EARLY)
def test_experts_that_would_be_merged_wrong_are_refused_on_a_fresh_adapter(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, case = trained(tmp_path, "Qwen3Moe")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()  # as every adapter starts
    spoilt, said = EARLY[fault]
    spoilt(monkeypatch)
    with pytest.raises(UserError, match=f"cannot merge: .*{said}"):
        check_merge(case, model.to("meta"))
