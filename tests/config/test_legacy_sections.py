"""Sections of earlier versions, saved or passed as overrides, are converted to the present form."""

from typing import Any

import pytest
import yaml

from halos.config import resume_policy, run_config
from halos.config.arithmetic_version import CISPO_BOUNDED_BELOW
from halos.config.legacy_sections import upgrade, with_target
from halos.errors import UserError

OPTIM = {"name": "adamw", "lr": 1e-6, "lr_by_peft": {"none": 1e-6}, "lr_from_scratch": {"none": 5e-4}, "betas": [0.9, 0.999],
         "eps": 1e-8, "weight_decay": 0.0, "init_from": None}  # fmt: skip
YOUNGER = {"loraplus_lr_ratio": None, "lr_by_name": {}}


def saved_run(**sections: Any) -> str:
    return yaml.safe_dump({"optim": OPTIM, "schedule": {"name": "cosine", "warmup": 0.1, "final": 0.0}, "seed": 0, **sections})


def test_a_run_from_before_targets_resumes_with_its_settings_and_its_kernel() -> None:
    now = run_config.load(saved_run(), {}, "runs/demo")
    own = {key: value for key, value in OPTIM.items() if key != "name"}
    assert now["optim"] == {**YOUNGER, **own, "_target_": "halos.optimizers.standard.adamw", "fused": False}
    assert now["schedule"] == {"_target_": "halos.schedules.cosine", "warmup": 0.1, "final": 0.0}
    upgrade(now)
    assert now["optim"]["fused"] is False, "of what is new already nothing changes"
    assert {"optim.fused", "optim.lr_by_name"} <= set(run_config.added_keys(saved_run(), "runs/demo"))
    assert "optim.fused" not in run_config.added_keys(saved_run(optim={**OPTIM, "name": "sgd"}), "runs/demo")
    assert "optim.fused" not in run_config.added_keys(yaml.safe_dump({"optim": now["optim"]}), "runs/demo")


def test_keys_of_a_target_or_of_online_runs_are_added_to_the_runs_that_have_them() -> None:
    grpo, rloo = ({"_target_": f"halos.losses.{name}.{name}", "beta": 0.1} for name in ("grpo", "rloo"))
    assert run_config.load(saved_run(loss=grpo), {}, "runs/demo")["loss"]["kl_ratio"] is False
    assert run_config.load(saved_run(loss=grpo), {}, "runs/demo")["loss"]["baseline"] == "mean"
    assert run_config.load(saved_run(loss=rloo), {}, "runs/demo")["loss"]["dual_clip"] is None
    assert "kl_ratio" not in run_config.load(saved_run(loss=rloo), {}, "runs/demo")["loss"]
    added = {name: set(run_config.added_keys(saved_run(loss=loss, online=online), "runs/demo"))
             for name, loss, online in (("grpo", grpo, None), ("live", rloo, {"steps": 3}))}  # fmt: skip
    assert {"loss.kl_ratio", "online.correction"} & added["grpo"] == {"loss.kl_ratio"}
    assert {"loss.kl_ratio", "online.correction"} & added["live"] == {"online.correction"}
    scored = saved_run(loss=rloo, online={"steps": 3, "scorer": {"name": "function", "functions": ["ends"]}})
    assert run_config.load(scored, {}, "runs/demo")["online"]["scorer"]["aggregation"] == "sum"
    assert "online.scorer.aggregation" in run_config.added_keys(scored, "runs/demo")
    weighed = run_config.load(saved_run(loss=rloo, online={"steps": 3}, train={"correction": "mask"}), {}, "runs/demo")
    assert [weighed[section]["correction_floor"] for section in ("train", "online")] == [None, None]


def test_a_run_that_began_while_cispo_did_not_read_a_lower_bound_goes_on_without_one() -> None:
    def record(version: int, **changed: list[Any]) -> str:
        node = {
            "content": {"arithmetic": str(version)},
            "sources": {},
            "changed": {f"loss.{key}": both for key, both in changed.items()},
        }
        return yaml.safe_dump(node)

    def bound(objective: str, *records: str) -> Any:
        saved = saved_run(loss={"_target_": "halos.losses.grpo.grpo", "objective": objective, "clip_low": 0.2})
        attempts = {f"{number:03d}.yaml": text for number, text in enumerate(records)}
        return run_config.load(saved, attempts, "runs/demo")["loss"]["clip_low"]

    before, now = CISPO_BOUNDED_BELOW - 1, CISPO_BOUNDED_BELOW
    assert bound("cispo", record(before), record(now)) is None
    assert bound("cispo", record(before), record(before, clip_low=[0.2, 0.5])) is None
    assert bound("cispo", record(before), record(now, clip_low=[None, 0.5])) == 0.5
    assert bound("cispo", record(now)) == bound("clip", record(before)) == 0.2


@pytest.mark.parametrize(("name", "keeps"), [("adam", {"betas", "eps"}), ("rmsprop", {"eps"}), ("sgd", set())])
def test_keys_that_an_optimizer_never_read_are_dropped(name: str, keeps: set[str]) -> None:
    now = run_config.load(saved_run(optim={**OPTIM, "name": name}), {}, "runs/demo")["optim"]
    assert now["_target_"] == f"halos.optimizers.standard.{name}"
    assert now.keys() & {"betas", "eps", "fused"} == keeps


def test_changes_by_name_in_earlier_attempts_persist() -> None:
    records = {"001.yaml": "changed: {optim.name: [adamw, sgd], schedule.name: [cosine, constant]}",
               "002.yaml": "changed: {optim.lr: [1.0e-6, 1.0e-5]}"}  # fmt: skip
    now = run_config.load(saved_run(), records, "runs/demo")
    assert (now["optim"]["_target_"], now["optim"]["lr"]) == ("halos.optimizers.standard.sgd", 1e-5)
    assert now["schedule"] == {"_target_": "halos.schedules.constant", "warmup": 0.1}


def test_a_name_override_replaces_the_target_and_other_overrides_are_kept_for_validation() -> None:
    node = {
        "_target_": "halos.optimizers.standard.adamw",
        "name": "sgd",
        "betas": [0.9, 0.9],
        "eps": 1e-8,
        "fused": "auto",
        "lr": 1,
    }
    assert with_target("optim", node) == {"_target_": "halos.optimizers.standard.sgd", "lr": 1}
    assert "eps" in with_target("optim", node, ["optim.eps", "schedule.betas"])
    own = {"_target_": "mine.lion", "name": "a key of its own"}
    assert with_target("optim", own) == own
    with pytest.raises(UserError, match="optim=muon"):
        with_target("optim", {**node, "name": "muon"})


def test_shared_optimizer_keys_are_compared_one_by_one_and_the_rest_together() -> None:
    old = {"_target_": "a.adamw", "lr": 1, "betas": [1]}
    assert resume_policy.differences("optim", old, {**old, "lr": 2}) == [], "optim.lr has an entry of its own"
    assert resume_policy.differences("optim", old, {**old, "betas": [2]}) == [("optim.betas", [1], [2])]
    other = {"_target_": "a.sgd", "lr": 2}
    assert resume_policy.differences("optim", old, other) == [("optim", old, other)]
