"""Patterns of ranks and alphas: what is saved means the same in any order, and what depends on it is refused."""

import itertools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
from test_merge import adapted, combined, make_base, said

from halos.errors import UserError
from halos.merge import lora, proof
from halos.models import adapter as adapters

TYPED = {"model.layers.1.mlp.up_proj": 256, "mlp.up_proj": 4, r"layers\.0\..*": 12}
SETTINGS = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": "all-linear", "bias": "none", "use_rslora": False,
            "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [],
            "target_parameters": []}  # fmt: skip


def attached(place: Path, **settings: Any) -> Any:
    base = make_base("Llama", place, tied=False)
    return adapters.attach(base, {**SETTINGS, **settings}, base=str(place), reward=None, seed=0)


def test_the_scales_of_training_are_those_of_every_reader_whatever_the_order(tmp_path: Path) -> None:
    model = attached(tmp_path / "base", alpha_pattern=TYPED, rank_pattern={"q_proj": 2, "0.self_attn.q_proj": 8})
    used = lora.scales_of(model)
    assert used["model.layers.1.mlp.up_proj"] == 256 / 4
    assert used["model.layers.0.mlp.up_proj"] == 4 / 4
    assert used["model.layers.0.self_attn.q_proj"] == 12 / 2
    assert used["model.layers.1.self_attn.q_proj"] == 6 / 2
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    path = tmp_path / "adapter" / "adapter_config.json"
    saved = json.loads(path.read_text())
    for order in itertools.islice(itertools.permutations(saved["alpha_pattern"].items()), 0, 5000, 997):
        path.write_text(json.dumps({**saved, "alpha_pattern": dict(order)}))
        read = peft.PeftModel.from_pretrained(make_base("Llama", tmp_path / "again", tied=False), str(tmp_path / "adapter"))
        assert lora.scales_of(read) == used


def test_a_name_that_ends_anothers_fits_its_own_layer_only() -> None:
    assert lora._matches(lora.exact("h.1.c_fc"), "h.1.c_fc")
    assert not any(lora._matches(lora.exact("h.1.c_fc"), name) for name in ("x.h.1.c_fc", "h.11.c_fc", "hx1xc_fc", "h.1.c_fc.a"))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_fits_no_layer_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"peft.{key}: 'up_projj' matches none"):
        attached(tmp_path / "base", **{key: {"up_projj": 8}})


def test_a_strangers_patterns_whose_meaning_depends_on_order_are_refused(tmp_path: Path) -> None:
    model = adapted(make_base("Llama", tmp_path / "base", tied=False), "Llama", alpha_pattern=TYPED)  # by PEFT alone
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    case = proof.Case(tmp_path / "base", tmp_path / "adapter", None, model.dtype)
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match=r"several patterns of alpha_pattern match model.layers.\d.mlp.up_proj, .* 4, (12|256)"):
        combined(case, tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


def test_patterns_that_agree_are_read_whatever_their_order(tmp_path: Path) -> None:
    model = adapted(make_base("Llama", tmp_path / "base", tied=False), "Llama", alpha_pattern={"up_proj": 8, "mlp.up_proj": 8})
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    case = proof.Case(tmp_path / "base", tmp_path / "adapter", None, model.dtype)
    (tmp_path / "merged").mkdir()
    assert combined(case, tmp_path / "merged", live=said(model, case)).holds


def test_a_scale_that_is_saved_otherwise_than_it_was_trained_with_fails_the_proof(tmp_path: Path) -> None:
    model = attached(tmp_path / "base", alpha_pattern={"up_proj": 8})
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": {}}))
    case = proof.Case(tmp_path / "base", tmp_path / "adapter", None, model.dtype)
    (tmp_path / "merged").mkdir()
    result = combined(case, tmp_path / "merged", live=said(model, case))
    assert "model.layers.0.mlp.up_proj was trained with a scale of 2.0 and is saved with 1.5" in result.faults[0]


def test_an_adapter_goes_on_only_with_the_scales_it_was_trained_with(tmp_path: Path) -> None:
    attached(tmp_path / "base", alpha_pattern={"up_proj": 8}).save_pretrained(str(tmp_path / "adapter"))
    same = attached(tmp_path / "base", alpha_pattern={r"layers\..*\.up_proj": 8})
    adapters.refuse_different_settings(same, tmp_path / "adapter")
    adapters.load_adapter(same, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"scales its update of model.layers.0.mlp.up_proj by 2, and this run by 1.5"):
        adapters.load_adapter(attached(tmp_path / "base"), tmp_path / "adapter")
