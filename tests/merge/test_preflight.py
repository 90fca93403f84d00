"""What would fail at the end of a run is refused before its first step, however little the run would have trained."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_merge import VARIANTS, Variant, combined, said, trained

from halos.config.schema import Config
from halos.errors import UserError
from halos.logps.model import LanguageModel
from halos.logps.vocabulary import Vocabulary
from halos.merge import expected, merge, preflight, proof
from halos.merge.preflight import check_merge, check_merge_once
from halos.merge.probe import bit_sums_of, probe_ids, probe_trained
from halos.run.lifecycle import run

GOES = {
    "lora": ("Llama", VARIANTS["lora"]),
    "dora on Conv1D": ("GPT2", VARIANTS["dora"]),
    "grown, embedding whole": ("Qwen2", VARIANTS["grown, embedding whole"]),
    "a biased head": ("Phi", VARIANTS["grown, both whole"]),
    "a whole attention": ("Llama", Variant({"target_modules": ["up_proj"], "modules_to_save": ["self_attn"]})),
    "a layer by its number": ("Llama", Variant({"target_modules": ["up_proj"], "modules_to_save": ["model.layers.1"]})),
    "reward": ("Llama", VARIANTS["reward"]),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", GOES)
def test_what_merges_in_the_end_passes_before_the_start(what: str, dtype: str, tmp_path: Path) -> None:
    name, variant = GOES[what]
    model, case = trained(tmp_path, name, variant, tied=name == "Qwen2", dtype=dtype)
    check_merge(case, model.to("meta"))


def merge_and_recomputation_share_a_wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    scaling, scale = merge.scaling, expected._AdapterChanges._scale
    monkeypatch.setattr(merge, "scaling", lambda *given: 2 * scaling(*given))
    monkeypatch.setattr(expected._AdapterChanges, "_scale", lambda *given: 2 * scale(*given))


def a_formula_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = merge.scaling
    monkeypatch.setattr(merge, "scaling", lambda *given: 1.001 * scaling(*given))


def a_tensor_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = merge.Merge.entries
    monkeypatch.setattr(merge.Merge, "entries", lambda self, dtype: dict(list(entries(self, dtype).items())[1:]))


def both_forget_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    a_tensor_is_forgotten(monkeypatch)
    expected_model = expected.expected_model
    monkeypatch.setattr(expected, "expected_model", lambda *given: replace(
        whole := expected_model(*given), tensors=dict(list(whole.tensors.items())[1:])))  # fmt: skip


FAULTS = [
    (a_formula_is_wrong, "differs from its formula"),
    (merge_and_recomputation_share_a_wrong_scale, "tried on a small model of the same architecture"),
    (a_tensor_is_forgotten, r"would be absent and ought to be \["),
    (both_forget_a_tensor, "would find missing keys"),
]


@pytest.mark.parametrize(("fault", "said"), FAULTS, ids=lambda each: getattr(each, "__name__", ""))
def test_a_merge_that_would_go_wrong_is_found_on_a_fresh_adapter(
    fault: Callable[..., None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, case = trained(tmp_path, "Llama", VARIANTS["lora"], tied=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()  # as every adapter starts
    fault(monkeypatch)
    with pytest.raises(UserError, match=f"cannot merge: .*{said}"):
        check_merge(case, model)


def test_an_adapter_of_layers_that_the_small_model_lacks_is_tried_on_all_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = Variant({"target_modules": ["model.layers.1.mlp.up_proj"]})
    model, case = trained(tmp_path, "Llama", last, tied=False)
    check_merge(case, model)
    merge_and_recomputation_share_a_wrong_scale(monkeypatch)
    with pytest.raises(UserError, match="tried on a small model of the same architecture"):
        check_merge(case, model)


def test_a_merge_is_tried_again_where_anything_that_it_depends_on_is_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = list[proof.Case]()
    monkeypatch.setattr(preflight, "check_merge", lambda case, model: bool(tried.append(case)) or len(tried) > 1)
    model, case = trained(tmp_path, "Llama", VARIANTS["lora"], tied=False)

    def trials(case: proof.Case) -> int:
        check_merge_once(case, model, tmp_path / "cache")
        return len(tried)

    assert trials(case) == 1
    assert trials(case) == trials(case) == 2  # the first was not of this very adapter
    assert trials(replace(case, dtype=torch.bfloat16)) == 3
    assert trials(replace(case, vocabulary=case.vocabulary + 1)) == 4
    model.peft_config["default"].lora_alpha += 1
    assert trials(case) == 5
    model.peft_config["default"].target_modules = {*model.peft_config["default"].target_modules, "another"}
    assert trials(case) == 6
    weights = case.base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert trials(case) == 7
    monkeypatch.setattr(preflight, "source_hash", lambda parts: "of other code")
    assert trials(case) == trials(case) == 8


def test_a_merge_that_fails_fails_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, case = trained(tmp_path, "Llama", VARIANTS["lora"], tied=False)
    with monkeypatch.context() as patch:
        a_formula_is_wrong(patch)
        for _ in range(2):
            with pytest.raises(UserError, match="differs from its formula"):
                check_merge_once(case, model, tmp_path / "cache")
    check_merge_once(case, model, tmp_path / "cache")


def test_whole_layers_beside_an_adapter_train_and_end_merged(configure: Callable[..., Config], tmp_path: Path) -> None:
    words = ["loss=sft", "peft=lora", "train.steps=2", "train.batch_size=8", "checkpoint.every=null", "optim.lr=1e-2"]
    assert run(configure(*words, "peft.target_modules=[up_proj]", "peft.modules_to_save=[self_attn]"), []) == 0
    assert json.loads((tmp_path / "run" / "FINAL" / "merge_report.json").read_text())["holds"]


# --- the witness


def as_trained(model: Any, case: proof.Case, *, half: bool = False) -> Any:
    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext()

    ids = probe_ids(Vocabulary(case.vocabulary, case.tokens), 300)
    return probe_trained(LanguageModel(model), model, ids, autocast=autocast, half=half, temperature=1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_computes_in_half_precision_is_a_witness_too(dtype: str, tmp_path: Path) -> None:
    model, case = trained(tmp_path, "Llama", VARIANTS["lora"], tied=False, dtype=dtype)
    live = as_trained(model, case, half=True)
    assert live.unit == torch.finfo(torch.bfloat16).eps
    result = combined(case, tmp_path / "merged", live=live)
    assert result.holds, result.faults
    model.get_base_model().lm_head.weight.data.mul_(1.3)  # as if it had been trained on another base
    assert not combined(case, tmp_path / "merged", live=as_trained(model, case, half=True)).holds


def test_a_model_on_a_quantised_base_says_what_its_adapter_adds(tmp_path: Path) -> None:
    variant = Variant({"r": 4, "lora_alpha": 64})
    model, case = trained(tmp_path, "Llama", variant, tied=False)
    inner = model.get_base_model()
    inner.is_quantized = True
    for name, parameter in inner.named_parameters():
        if "base_layer.weight" in name:  # to fifteen levels a row, as four bits have them
            step = parameter.abs().amax(1, keepdim=True) / 7
            parameter.data = (parameter / step).round() * step
    live = as_trained(model, case)
    assert live.without_adapter is not None
    result = combined(case, tmp_path / "merged", live=live)
    assert result.holds, result.faults
    assert result.measure == "typical difference of what the adapter adds"
    wrong = replace(live, values=live.without_adapter - (live.values - live.without_adapter))
    assert not combined(case, tmp_path / "merged", live=wrong).holds


def test_an_adapter_that_is_not_saved_as_it_was_trained_is_told_by_its_bits(tmp_path: Path) -> None:
    model, case = trained(tmp_path, "Llama", VARIANTS["head whole"], tied=False)
    live = said(model, case)
    assert len(live.bit_sums) == len(load_file(case.adapter / "adapter_model.safetensors"))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).view(-1)[3] *= 1 + 2**-20
    changed = replace(live, bit_sums=bit_sums_of(model))
    result = combined(case, tmp_path / "merged", live=changed)
    assert any("of the adapter differs from the trained model's" in fault for fault in result.faults)


def test_a_hybrid_without_attention_in_its_small_model_is_rehearsed(tmp_path: Path) -> None:
    """Its cache knows no layer that could tell how many tokens there were."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
    config = transformers.JambaConfig(**sizes, num_key_value_heads=2, num_experts=2, use_mamba_kernels=False, mamba_d_state=8)
    transformers.JambaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["in_proj", "down_proj"]))
    check_merge(proof.Case(tmp_path / "base", tmp_path / "adapter", None, torch.float32), model)
