"""Keys that a resume may change, refuses, or takes under a condition."""

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from halos.config import resume_policy
from halos.config.resume_policy import CONDITIONS, NOT_COMPARED, ON_RESUME, Change, PreviousRun
from halos.config.schema import (
    CONTENT,
    MATHEMATICS,
    SAFE,
    Config,
    Data,
    Model,
    Objective,
    Peft,
    Reference,
    Scope,
    Train,
    key_facts,
    keys_of,
)
from halos.config.suggest import schema_keys
from halos.errors import UserError

ADAMW = {"_target_": "halos.optimizers.standard.adamw", "betas": [0.9, 0.999], "eps": 1e-8, "fused": False, "init_from": None}


FALLING = {"_target_": "halos.schedules.cosine", "warmup": 0.0, "final": 0.0}


def config(**values: Any) -> Config:
    made = Config(
        loss={"_target_": "halos.losses.dpo.dpo", "beta": 0.1}, model=Model(name_or_path="tiny"), reference=Reference(),
        data=Data(train=["a.jsonl"]), peft=Peft(name="none", lora_dropout=0.0, rank_pattern={}),
        train=Train(steps=100, epochs=1.0, microbatch_size=4, early_stopping=None), optim={**ADAMW, "lr": 1e-5},
        schedule={"_target_": "halos.schedules.constant", "warmup": 0.0}, trainer={"_target_": None},
        objective=Objective(metric="loss", mode="min"),
        plugins=[], checkpoint={"_target_": "halos.hooks.checkpoint.CheckpointHook", "every": 10}, hooks={}, seed=0,
    )  # fmt: skip
    for key, value in values.items():
        *sections, name = key.split("__")
        node = made
        for section in sections:
            node = getattr(node, section) if is_dataclass(node) else node[section]
        node.update({name: value}) if isinstance(node, dict) else setattr(node, name, value)
    return made


def found(new: Config, old: Config | None = None, path: Path = Path("nowhere"), newest: int | None = 50) -> list[Change]:
    return resume_policy.compare(new, PreviousRun(asdict(old or config()), path, newest))


def test_every_key_of_the_schema_is_compared_or_belongs_to_the_command() -> None:
    every = {key for key, kind in schema_keys().items() if not is_dataclass(kind)}
    assert {key for key, _ in key_facts()} == every | set(keys_of(Scope.RECORD))
    assert set(ON_RESUME) == every - set(keys_of(*NOT_COMPARED))
    assert set(ON_RESUME.values()) == {MATHEMATICS, SAFE, CONTENT, *CONDITIONS}


def test_the_same_value_in_another_notation_is_no_change() -> None:
    assert found(config()) == []
    assert found(config(loss__beta="1e-1", optim__lr="1e-5", train__steps=100.0)) == []
    assert [c.key for c in found(config(loss__beta="much", hooks={"a": {}}, model__add_tokens=["1"]))] == [
        "loss.beta", "model.add_tokens", "hooks.a",
    ]  # fmt: skip
    assert not resume_policy._same(True, 1)
    assert not resume_policy._same("", False)


def test_a_changed_key_is_named_and_a_changed_target_is_named_whole() -> None:
    assert [str(c) for c in found(config(checkpoint__every=None))] == ["checkpoint.every 10 -> null"]
    other = {"_target_": "my.Own", "when": 3}
    assert [(c.key, c.new) for c in found(config(checkpoint=other))] == [("checkpoint", other)]
    hooked = config(hooks={"a": {"_target_": "m.A", "x": 1}})
    assert [(c.key, c.new) for c in found(config(hooks={"b": {}}), old=hooked)] == [("hooks.a", None), ("hooks.b", {})]


@pytest.mark.parametrize(
    "change", [{"loss__beta": 0.3}, {"seed": 1}, {"peft__rank_pattern": {"q.proj": 4}}, {"data__eval": ["b"]}]
)
def test_changes_of_the_mathematics_are_refused_by_name(change: dict[str, Any]) -> None:
    [one] = found(config(**change))
    assert one.why is not None
    with pytest.raises(UserError, match=one.key):
        resume_policy.refuse_unsafe([one], Path("runs/demo"))


@pytest.mark.parametrize(
    ("schedule", "steps", "newest", "why"),
    [
        (("constant", 0), 200, 50, None),
        (("constant", 20), 200, 10, None),
        (("constant", 0), 60, 50, None),
        (("cosine", 0), 200, 50, "the cosine schedule is spread over all steps"),
        (("cosine", 0), 200, 100, "the cosine schedule is spread over all steps"),  # it has finished
        (("linear", 20), 99, 50, "the linear schedule is spread over all steps"),
        (("constant", 0.1), 200, 50, "its warm-up is a fraction of all steps (schedule.warmup=0.1)"),  # 10 steps, not 20
        (("constant", 0.1), 101, 50, None),  # 10 steps of either
        (("constant", 0.1), 600, None, None),  # starts over
        (("constant", 0.1), None, 50, "its warm-up is a fraction of all steps (schedule.warmup=0.1)"),
        (("inverse_sqrt", 10), 200, 50, None),
        (("wsd", 10), 200, 90, None),  # before the decay
        (("wsd", 10), 200, 92, "the wsd schedule is spread over all steps"),
        (("wsd", 0.1), 200, 90, "its warm-up is a fraction of all steps (schedule.warmup=0.1)"),
        (("cosine", 0), 200, None, None),  # starts over
    ],
)
def test_more_steps_are_safe_where_those_taken_had_the_learning_rates_of_a_longer_run(
    schedule: tuple[str, float], steps: int | None, newest: int | None, why: str | None
) -> None:
    shapes = {"wsd": {"decay": 10, "final": 0.0, "shape": "linear"}, "cosine": {"final": 0.0}, "linear": {"final": 0.0}}
    shape = shapes.get(schedule[0], {})
    settings = {"schedule": {"_target_": f"halos.schedules.{schedule[0]}", "warmup": schedule[1], **shape}}
    [one] = found(config(**settings, train__steps=steps), config(**settings), newest=newest)
    assert (one.key, one.why) == ("train.steps", why)


@pytest.mark.parametrize(
    ("shape", "new", "why"),
    [
        ("cosine", {"steps": 8, "epochs": 0.2}, "the cosine schedule is spread over all steps"),
        ("wsd", {"steps": 23, "epochs": 0.2}, None),
        ("wsd", {"steps": None, "epochs": 0.3}, None),  # 22 steps or so
        ("wsd", {"steps": None, "epochs": 0.12}, "the wsd schedule is spread over all steps"),  # 9 or so, from 5 on falling
        ("constant", {"steps": None, "epochs": 0.12}, None),
    ],
)
def test_a_run_given_in_epochs_had_the_number_of_steps_that_it_recorded(
    shape: str, new: dict[str, float | None], why: str | None
) -> None:
    shapes = {"wsd": {"decay": 4, "final": 0.0, "shape": "linear"}, "cosine": {"final": 0.0}, "constant": {}}
    settings = {"schedule": {"_target_": f"halos.schedules.{shape}", "warmup": 0, **shapes[shape]}}
    old = asdict(config(**settings, train__steps=None, train__epochs=0.2))
    past = PreviousRun(old, Path("nowhere"), newest=8, total=15)
    (change,) = resume_policy.compare(config(**settings, train__steps=new["steps"], train__epochs=new["epochs"]), past)
    assert change.why == why


def test_the_microbatch_size_is_safe_without_dropout(tmp_path: Path) -> None:
    def why(path: Path = tmp_path / "run", **settings: Any) -> str | None:
        [one] = found(config(train__microbatch_size=2, **settings), config(**settings), path)
        return one.why

    assert why() is None
    assert why(peft__lora_dropout=0.1) is None, "there is no LoRA"
    assert why(peft__name="lora", peft__lora_dropout=0.1) == "with peft.lora_dropout=0.1 it decides which elements are dropped"
    base = tmp_path / "base"
    base.mkdir()
    facts: dict[str, Any] = {"attention_dropout": 0.0, "classifier_dropout": None, "use_dropout": True}
    (base / "config.json").write_text(json.dumps(facts))
    assert why(model__name_or_path=str(base)) is None
    (base / "config.json").write_text(json.dumps({**facts, "text_config": {"resid_pdrop": 0.1}}))
    assert why(model__name_or_path=str(base)) == "with the model's resid_pdrop=0.1 it decides which elements are dropped"
    (base / "config.json").write_text(json.dumps({**facts, "router_jitter_noise": 0.01}))
    assert why(model__name_or_path=str(base)) == "with the model's router_jitter_noise=0.01 it decides the noise"
    assert "is unknown" in str(why(model__name_or_path="org/never-downloaded"))
    assert "is unknown" in str(why(model__name_or_path="some/model.gguf"))
    saved = tmp_path / "run" / "checkpoints" / "step-00000002" / "model"
    saved.mkdir(parents=True)
    (saved / "config.json").write_text(json.dumps(facts))
    assert why(model__name_or_path="org/never-downloaded") is None


def test_the_objective_is_safe_without_early_stopping() -> None:
    assert [c.why for c in found(config(objective__metric="kl"))] == [None]
    watched = config(train__early_stopping=2)
    assert "early stopping" in str(found(config(train__early_stopping=2, objective__mode="max"), watched)[0].why)


def test_a_key_added_after_the_run_began_is_safe() -> None:
    old = asdict(config())
    del old["train"]["max_grad_norm"]
    [one] = resume_policy.compare(config(train__max_grad_norm=1.0), PreviousRun(old, Path("nowhere"), None))
    assert (one.key, one.old, one.new, one.why) == ("train.max_grad_norm", None, 1.0, None)


def test_one_message_names_all_refused_changes() -> None:
    new = config(loss__beta=0.3, seed=1, train__steps=200, schedule=FALLING, train__log_every=5)
    with pytest.raises(UserError) as caught:
        resume_policy.refuse_unsafe(found(new, config(schedule=FALLING)), Path("runs/demo"))
    for part in ("loss.beta 0.1 -> 0.3", "seed 0 -> 1", "train.steps 100 -> 200 (the cosine schedule", "resume_changes=allow"):
        assert part in str(caught.value)
    assert "log_every" not in str(caught.value)
    resume_policy.refuse_unsafe(found(config(train__log_every=5)), Path("runs/demo"))


def test_changes_of_attempts_are_applied_in_order_and_a_null_hook_is_removed() -> None:
    settings = asdict(config(hooks={"a": {}}))
    for changed in ({"train.steps": [100, 200], "hooks.b": [None, {}]}, {"train.steps": [200, 300], "hooks.a": [{}, None]}):
        resume_policy.apply_changes(settings, changed)
    assert (settings["train"]["steps"], settings["hooks"]) == (300, {"b": {}})


def test_keys_that_are_never_taken_from_a_saved_run_belong_to_the_command() -> None:
    own = {"resume", "resume_changes", "overwrite", "dry_run", "dry_run_rows", "plugins", "exp_name", "output_root", "run_dir"}
    assert set(keys_of(*NOT_COMPARED)) == {*own, *keys_of(Scope.RECORD)}
