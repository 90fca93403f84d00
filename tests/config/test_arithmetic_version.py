"""The changes of the arithmetic between a run's version and this one, and which of them affect the run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file

import train
from halos.config import arithmetic_version
from halos.config.arithmetic_version import (
    ATTENTION_IN_ONE_CALL,
    FROZEN_HEAD_ONCE,
    FUSED_LORA,
    HISTORY,
    VERSION,
    Revision,
    RunFacts,
)
from halos.logps import varlen_trial
from halos.run.models import ModelLoader


def computed(**other: Any) -> RunFacts:
    """Full fine-tuning of a small language model in float32."""
    config: Any = SimpleNamespace(
        peft=SimpleNamespace(name="none", bias="none", lora_dropout=0.0, target_modules="all-linear",
            init_from=None, modules_to_save=[]),
        online=None,
        reference=SimpleNamespace(name_or_path=None, cache="never", adapter="start", sync_every=None),
        train=SimpleNamespace(microbatch_size=4, microbatch_tokens=None, share_prompts=False, max_length=512,
                              log_every=1),
        loss={"_target_": "halos.losses.sft.sft"}, checkpoint={"merge_lora": True}, model=SimpleNamespace(attention="auto"),
        data=SimpleNamespace(system="keep", chat_template_kwargs={}),
        optim={}, humanline=SimpleNamespace(low=None, high=None),
    )  # fmt: skip
    known = {"before": {}, "model": {"vocab_size": 350}, "half": False, "reads": "language", "refers": False, "packed": True}
    return RunFacts(config, **{**known, "head": "layer", "device": "cuda", **other})


def why(now: RunFacts, since: int = 0) -> str:
    return "; ".join(str(change.why) for change in arithmetic_version.changes_since(since, now))


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        Revision(1, "2026-01-01", "one", lambda now: True),
        Revision(2, "2026-02-02", "two", lambda now: now.half),
        Revision(3, "2026-03-03", "three", lambda now: True),
        Revision(3, "2026-03-03", "accuracy", lambda now: True, of="metrics"),
    )
    monkeypatch.setattr(arithmetic_version, "HISTORY", lines)
    monkeypatch.setattr(arithmetic_version, "VERSION", 3)


@pytest.mark.usefixtures("history")
def test_exactly_the_changes_that_affect_a_run_are_named() -> None:
    assert why(computed()) == "since 2026-01-01 one; since 2026-03-03 three"
    assert why(computed(half=True), 1) == "since 2026-02-02 two; since 2026-03-03 three"
    assert why(computed(), 2) == "since 2026-03-03 three"
    assert why(computed(), 3) == ""
    [change] = arithmetic_version.changes_since(1, computed())
    assert str(change) == "arithmetic 1 -> 3"
    assert arithmetic_version.notes_since(2, computed()) == ["metrics: since 2026-03-03 accuracy"]
    assert arithmetic_version.notes_since(3, computed()) == []


@pytest.mark.usefixtures("history")
def test_a_run_of_a_newer_version_is_not_resumed() -> None:
    assert "a newer version" in why(computed(), 4)


def test_a_record_without_a_version_is_older_than_all() -> None:
    for record in (None, {}, {"arithmetic": None}, {"arithmetic": "-1"}):
        assert arithmetic_version.recorded_version(record) == 0
    assert arithmetic_version.recorded_version({"arithmetic": "2"}) == arithmetic_version.recorded_version({"arithmetic": 2}) == 2


def test_version_numbers_increase_without_gaps() -> None:
    numbers = [revision.number for revision in HISTORY]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(1, VERSION + 1))


HEAD, PACKED, OWN, BIASES, PROMPTS = "summed in float32", "not packed", "own head", "trained biases", "name of its file"


@pytest.mark.parametrize(
    ("now", "named"),
    [
        (computed(), None),
        (computed(model={"vocab_size": 50_000}), HEAD),  # 4,096 rows at most, of 671 in a chunk
        (computed(half=True), HEAD),
        (computed(model={"vocab_size": 350, "final_logit_softcapping": 30.0}), HEAD),
        (computed(half=True, reads="score"), None),
        (computed(packed=False), PACKED),
        (computed(head="own"), OWN),
        (computed(head="whole", reads="score"), None),
    ],
)
def test_changes_of_version_1_affect_only_the_runs_that_they_change(now: RunFacts, named: str | None) -> None:
    if named is None:
        assert arithmetic_version.changes_since(0, now) == []
    else:
        assert named in why(now)


def test_models_that_were_packed_though_their_attention_was_another_are_named() -> None:
    for kind, packed, named in (("llama4_text", False, True), ("llama4_text", True, False), ("llama", False, False)):
        now = computed(packed=packed, model={"vocab_size": 350, "model_type": kind})
        assert ("attention would be another" in why(now, 7)) is named


def test_how_shared_prompts_are_counted_affects_runs_with_dropout_and_a_bound_on_tokens() -> None:
    for dropout, model, tokens, share, named in (
        (0.1, {}, 4096, True, True), (0.0, {"router_jitter_noise": 0.01}, 4096, True, True), (0.0, {}, 4096, True, False),
        (0.1, {}, None, True, False), (0.1, {}, 4096, False, False),
    ):  # fmt: skip
        now = computed(model={"vocab_size": 350, "id2label": {0: "a"}, **model})
        now.config.peft.name, now.config.peft.lora_dropout = "lora", dropout
        now.config.train.microbatch_tokens, now.config.train.share_prompts = tokens, share
        assert ("too long to share it" in why(now, 7)) is named


def test_the_dropout_of_an_adapter_on_the_head_affects_runs_that_have_both() -> None:
    for name, dropout, modules, named in (
        ("lora", 0.1, ["q_proj", "lm_head"], True), ("lora", 0.1, ".*(lm_head|v_proj)", True), ("lora", 0.1, "all-linear", False),
        ("lora", 0.0, ["lm_head"], False), ("none", 0.1, ["lm_head"], False), ("lora", 0.1, ["q_proj"], False),
    ):  # fmt: skip
        now = computed()
        now.config.peft.name, now.config.peft.lora_dropout, now.config.peft.target_modules = name, dropout, modules
        assert ("dropout of an adapter on the head" in why(now, 9)) is named


def test_changes_of_merging_and_sampling_affect_the_runs_that_use_them() -> None:
    lora = computed(refers=True)
    lora.config.peft.name = "lora"
    assert why(lora) == ""
    assert [note.partition(":")[0] for note in arithmetic_version.notes_since(0, lora)] == ["FINAL"]
    lora.config.peft.bias = "all"
    assert BIASES in why(lora)
    for path, named in (("rows.jsonl", False), ("data/rows.jsonl", True), ({"path": "org/rows"}, True)):
        rounds = computed(before={"data": {"train": [path], "eval": []}})
        assert why(rounds) == ""
        rounds.config.online = SimpleNamespace(steps=None, loss="dpo")  # type: ignore[assignment]
        assert (PROMPTS in why(rounds)) is named


def test_a_live_loop_with_sft_is_affected_by_the_choice_of_its_samples() -> None:
    now = computed()
    for steps, target, named in ((4, "sft.sft", True), (4, "dpo.dpo", False), (None, "sft.sft", False)):
        now.config.online, now.config.loss["_target_"] = SimpleNamespace(steps=steps, loss="sft"), f"halos.losses.{target}"  # type: ignore[assignment]
        assert ("desirable samples" in why(now, 1)) is named


def test_online_runs_with_a_policy_gradient_are_affected_by_where_old_log_probs_come_from() -> None:
    now = computed()
    assert "the trainer's own" not in why(now, 3)
    for loss, named in (("grpo", True), ("a_loss_of_mine", True), ("dpo", False), ("kto", False)):
        now.config.online = SimpleNamespace(steps=None, loss=loss)  # type: ignore[assignment]
        assert ("the trainer's own" in why(now, 3)) is named


def test_changes_of_metrics_are_noted_and_refuse_nothing() -> None:
    pairs = computed()
    pairs.config.loss["_target_"] = "halos.losses.dpo.dpo"
    assert (arithmetic_version.changes_since(0, pairs), len(arithmetic_version.notes_since(0, pairs))) == ([], 1)


def test_equal_rewards_affect_only_runs_that_add_nothing_to_their_deviation() -> None:
    for loss, epsilon, named in (("grpo", 0.0, True), ("grpo", 1e-6, False), ("rloo", None, False)):
        now = computed()
        now.config.loss = {"_target_": f"halos.losses.{loss}.{loss}", "epsilon": epsilon}
        assert ("equal rewards have advantages of 0" in why(now, 11)) is named


@pytest.mark.parametrize(
    ("now", "named"),
    [
        (computed(half=True), True), (computed(half=True, reads="value"), True), (computed(), False),
        (computed(half=True, reads="score"), False), (computed(half=True, head="own"), False),
    ],
)  # fmt: skip
def test_float32_sums_of_logits_affect_runs_in_half_precision_alone(now: RunFacts, named: bool) -> None:
    now.config.peft.name = "lora"  # a frozen head too
    assert ("float32 sums" in why(now, 5)) is named


@pytest.mark.parametrize(
    ("peft", "reference", "named"),
    [
        ({"init_from": "adapter"}, {}, True), ({"bias": "all"}, {}, True), ({}, {"sync_every": 8}, True), ({}, {}, False),
        ({"init_from": "adapter"}, {"adapter": "off"}, False), ({"init_from": "adapter"}, {"cache": "always"}, False),
        ({"init_from": "adapter"}, {"name_or_path": "other"}, False),
    ],
)  # fmt: skip
def test_a_reference_with_other_values_of_what_is_trained_affects_runs_in_half_precision(
    peft: dict[str, str], reference: dict[str, object], named: bool
) -> None:
    for half in (True, False):
        now = computed(half=half, refers=True)
        now.config.peft.name = "lora"
        vars(now.config.peft).update(peft)
        vars(now.config.reference).update(reference)
        assert ("from its own values" in why(now, 16)) is (named and half)


def test_layers_that_are_trained_whole_affect_runs_in_half_precision() -> None:
    for half, layers, named in ((True, ["lm_head"], True), (False, ["lm_head"], False), (True, [], False)):
        now = computed(half=half)
        vars(now.config.peft).update(name="lora", modules_to_save=layers)
        assert ("compute in the base's dtype" in why(now, 16)) is named


def test_how_a_cpu_multiplies_affects_runs_in_half_precision_on_one() -> None:
    for half, device, named in ((True, "cpu", True), (True, "cuda", False), (False, "cpu", False)):
        assert ("sums of two terms" in why(computed(half=half, device=device), 17)) is named


def test_patterns_of_names_affect_runs_where_they_may_depend_on_how_a_name_begins() -> None:
    for pattern, named in ((r"^layers\.0", True), (r"model\.norm", True), (r"\.norm", True), ("value_head", False)):
        now = computed()
        now.config.optim["lr_by_name"] = {pattern: 0.0}
        assert ("names of the model itself" in why(now, 17)) is named
    assert why(computed(), 17) == ""


def test_evaluations_on_rollouts_have_other_metrics() -> None:
    for loss, named in (("grpo", True), ("rloo", True), ("dpo", False)):
        now = computed()
        now.config.loss["_target_"] = f"halos.losses.{loss}.{loss}"
        notes = arithmetic_version.notes_since(17, now)
        assert any("all samples of a prompt in one batch" in note for note in notes) is named


def test_runs_under_humanline_have_other_metrics() -> None:
    for bound, named in ((-1.5, True), (None, False)):
        now = computed()
        now.config.humanline.low = bound
        assert any("policy's log-probs" in note for note in arithmetic_version.notes_since(17, now)) is named


def test_losses_of_the_users_own_may_have_lost_a_perplexity_that_was_none() -> None:
    for target, named in (("mine.loss", True), ("halos.losses.sft.sft", False)):
        now = computed()
        now.config.loss["_target_"] = target
        assert any("perplexity is that of" in note for note in arithmetic_version.notes_since(17, now)) is named


def test_settings_of_the_template_affect_rounds_that_trained_without_them() -> None:
    for steps, kwargs, system, named in (
        (None, {"a": 1}, "keep", True), (None, {}, "merge", True), (None, {}, "keep", False), (9, {"a": 1}, "keep", False),
    ):  # fmt: skip
        now = computed()
        vars(now.config).update(online=SimpleNamespace(steps=steps, loss="dpo"))
        vars(now.config.data).update(chat_template_kwargs=kwargs, system=system)
        assert ("with which they sample" in why(now, 17)) is named


def test_only_sums_with_a_reward_function_of_the_users_own_are_affected_by_what_none_means() -> None:
    own, weighted = "mine.reward", {"function": "mine.reward", "weight": 2.0}
    for functions, named in ((["ends", own], True), ([weighted, "ends"], True), ([own], False), (["ends", "maths"], False)):
        before = {"online": {"scorer": {"functions": functions}}}
        assert ("does not apply" in why(computed(before=before), 5)) is named


def test_runs_whose_rewards_compare_final_answers_are_affected_by_how_they_are_compared() -> None:
    for functions, named in (
        (["ends", "exact_match"], True), ([{"function": "halos.online.rewards.maths"}], True), (["mine.exact_match"], False),
        (["last_number"], False), ([], False), (["halos.rollout.rewards.exact_match"], True),
    ):  # fmt: skip
        before = {"online": {"scorer": {"functions": functions}}}
        assert ("numbers by their values" in why(computed(before=before), 17)) is named
    assert not why(computed(), 17)


@pytest.mark.parametrize("since", [FROZEN_HEAD_ONCE, FUSED_LORA])
def test_a_run_goes_on_with_the_frozen_head_and_the_adapter_of_the_version_that_began_it(
    since: int, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(name: str, *words: str) -> dict[str, torch.Tensor]:
        assert train.start([*words, f"cache_dir={cache}"]) == 0
        return load_file(tmp_path / name / "FINAL" / "adapter" / "adapter_model.safetensors")

    words = [*SMALL, "loss=dpo", "peft=lora", "train.steps=2", "checkpoint.every=1", f"output_root={tmp_path}"]
    now = weights("now", *words, "exp_name=now")
    monkeypatch.setattr(arithmetic_version, "VERSION", since - 1)
    before = weights("before", *words, "exp_name=before")
    assert not all(torch.equal(now[name], before[name]) for name in now), "the two ways round otherwise"
    monkeypatch.undo()
    run = tmp_path / "before"
    resumed = weights("before", f"resume={run}/checkpoints/step-00000001")
    assert all(torch.equal(resumed[name], before[name]) for name in before)


def test_a_run_on_a_gpu_goes_on_with_the_attention_of_the_version_that_began_it(
    trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen_trial, "why_not", lambda device: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    gpu: Any = SimpleNamespace(device=torch.device("cuda"), mixed_precision="bf16")

    def attention(config: Any, **changes: Any) -> str:
        unread: Any = None
        loader = ModelLoader(replace(config, **changes), *[unread] * 4, gpu, unread)
        return loader.attention(torch.float32).removeprefix("halos_")

    now = trainer("loss=sft", "exp_name=now").run.config
    monkeypatch.setattr(arithmetic_version, "VERSION", ATTENTION_IN_ONE_CALL - 1)
    before = trainer("loss=sft", "exp_name=before").run.config
    assert attention(now, resume=now.run_dir) == "varlen"
    assert attention(before, resume=before.run_dir) == "segments"
    assert attention(before, resume=before.run_dir, model=replace(before.model, attention="varlen")) == "varlen"
    assert attention(before) == "varlen", "a new run in the place of that one"
