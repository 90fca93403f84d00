"""Proofs of the forward are cached, logged and written to a report; a check that fails stops the run with one message."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from halos.distributed.launch import make_accelerator
from halos.distributed.replicated import Replicated
from halos.errors import UserError
from halos.logps import hidden
from halos.logps.attention import SEGMENTS
from halos.logps.model import LanguageModel
from halos.models import tiny
from halos.models.load import load_model, load_tokenizer
from halos.prove import checks, loaded_model, verdict
from halos.prove.small_copy import ForwardSpec, SmallCopy

LLAMA = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=300)
SPEC = ForwardSpec(config=LLAMA, peft=None, attention=SEGMENTS, reward=None, valued=False, refers=False, longest=None,
              dtype=torch.float32, autocast=False, device=torch.device("cpu"), temperature=1.0)  # fmt: skip


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[ForwardSpec]:
    """Forwards that were proved rather than read from the cache."""
    proved, real = [], checks.prove
    monkeypatch.setattr(checks, "prove", lambda spec: (proved.append(spec), real(spec))[1])
    return proved


def test_a_verdict_is_cached_under_all_that_it_depends_on(tmp_path: Path, proofs: list[ForwardSpec]) -> None:
    first = verdict.verdict_on(SPEC, tmp_path, again=False)
    assert verdict.verdict_on(SPEC, tmp_path, again=False) == first
    wider = transformers.LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": 500, "eos_token_id": 7})  # computes alike
    verdict.verdict_on(replace(SPEC, config=wider), tmp_path, again=False)
    assert len(proofs) == 1
    for other in (replace(SPEC, temperature=0.5), replace(SPEC, valued=True), replace(SPEC, dtype=torch.bfloat16)):
        verdict.verdict_on(other, tmp_path, again=False)
    assert len(proofs) == 4
    verdict.verdict_on(SPEC, tmp_path, again=True)
    assert len(proofs) == 5


def test_a_damaged_verdict_is_proved_again(tmp_path: Path, proofs: list[ForwardSpec]) -> None:
    verdict.verdict_on(SPEC, tmp_path, again=False)
    (path,) = (tmp_path / "forward").iterdir()
    for text in ("[", "[]", '[{"what": "log-probs"}]', '[{"what": "log-probs", "error": 1, "allowed": 0}]'):
        path.write_text(text)
        assert verdict.verdict_on(SPEC, tmp_path, again=False).checks
    assert len(proofs) == 5


def test_numbers_that_are_not_the_models_own_are_refused_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict.plan_for(LLAMA, reward=None, attention=SEGMENTS)
    real = hidden._packed
    monkeypatch.setattr(hidden, "_packed", lambda *given: 1.01 * real(*given))
    with pytest.raises(UserError, match=r"not the model's own: log-probs .* off on a small random copy of llama") as refusal:
        verdict.verdict_on(SPEC, tmp_path, again=False)
    assert "train.prove=off" in str(refusal.value)
    assert not (tmp_path / "forward").exists()


def test_the_small_copy_has_the_plan_of_the_run() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64}  # fmt: skip
    config = transformers.Phi3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=300,
        pad_token_id=0, max_position_embeddings=512, original_max_position_embeddings=64, rope_parameters=rope,
    )  # fmt: skip
    copied = SmallCopy(replace(SPEC, config=config, longest=64))
    assert copied.module.plan == copied.plan
    assert copied.plan.is_packed


def test_one_row_through_the_loaded_model_sees_what_is_wrong_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.build(tmp_path / "tiny")
    tokenizer, _ = load_tokenizer(tmp_path / "tiny", add_tokens=[])
    loaded = load_model(tmp_path / "tiny", tokenizer, reward=None, dtype=torch.float32, attention=SEGMENTS)
    module: Any = LanguageModel(loaded, temperature=0.7).train()

    def proved(**more: Any) -> bool:
        settings = {"temperature": 0.7, "longest": 1024, **more}
        return all(
            check.holds for check in loaded_model.prove(module, Replicated(make_accelerator("float32")), tokenizer, **settings)
        )

    assert proved()
    assert proved(longest=8)
    assert module.training
    assert loaded.config._attn_implementation == SEGMENTS
    assert not proved(temperature=1.0)
    monkeypatch.setattr(loaded_model, "_from_rank_0", lambda value: 1.01 * value)  # a rank that has loaded other weights
    assert not proved()
    monkeypatch.undo()
    real = hidden._packed
    monkeypatch.setattr(hidden, "_packed", lambda *given: real(*given).roll(1, 0))
    assert not proved()


def test_a_run_writes_what_was_proved_and_says_where_nothing_was(
    trainer: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert trainer("loss=dpo", "peft=lora")
    report = json.loads((tmp_path / "run" / "forward_report.json").read_text())
    holds = {check["what"]: check["error"] <= check["allowed"] for check in report["copy"] + report["start"]}
    assert {"log-probs", "the reference's log-probs", "one row, as it is trained"} <= holds.keys()
    assert all(holds.values())
    assert "packed rows, model.attention=segments; on a small copy log-probs within" in caplog.text
    assert trainer("loss=dpo", "peft=lora", "train.prove=off", "exp_name=off")
    report = json.loads((tmp_path / "off" / "forward_report.json").read_text())
    assert (report["prove"], report["copy"], report["start"]) == ("off", [], [])
    assert "packed rows, model.attention=segments; NOT PROVED (train.prove=off)" in caplog.text


def test_a_copy_that_has_not_the_layers_of_the_runs_adapter_says_what_it_has_instead() -> None:
    lora = {**adapter_settings(), "target_modules": ["layers.31.self_attn.q_proj"]}
    deep = transformers.LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 32})
    names = [check.what for check in checks.prove(replace(SPEC, config=deep, peft=lora, refers=True))[1]]
    assert all("an adapter on every linear layer, since the run's names layers" in what for what in names)
    names = [check.what for check in checks.prove(replace(SPEC, peft=adapter_settings(), refers=True))[1]]
    assert not any("every linear layer" in what for what in names)


def adapter_settings() -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj"], "target_parameters": [], "bias": "none",
            "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": []}  # fmt: skip
