"""Valid configurations pass; for all others a message names the key, the value and the remedy."""

import ast
import json
import os
import re
import shutil
from collections import namedtuple
from copy import deepcopy
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from peft import LoraConfig

from halos.cli.compose import ConfigTree
from halos.cli.overrides import parse
from halos.config import run_config, validate
from halos.config.schema import Config, Peft
from halos.config.suggest import OTHER_NAMES, kind_of, nearest, schema_keys
from halos.errors import UserError
from halos.redaction import redact

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config"
LOSSES = sorted({path.stem for path in (CONFIG / "loss").glob("*.yaml")} - {"mixture"})  # which a command gives its parts
RUN = ("loss=dpo", "model=tiny", "data=arithmetic", "exp_name=demo")
LIVE = ("loss=online", "online.loss=grpo", "online.steps=5", "model=tiny", "data=arithmetic", "exp_name=demo")
ROLLOUTS = ("loss=dapo",)
ROUNDS = tuple("online.rounds=2" if word == "online.steps=5" else word for word in LIVE)
CHOICES = {group.name: sorted(path.stem for path in group.glob("*.yaml")) for group in CONFIG.iterdir() if group.is_dir()}


@cache
def _composed(overrides):
    tree = ConfigTree()
    return tree.compose_parsed([parse(text, tree.choices) for text in overrides])[0]


def composed(*overrides, **values):
    config = deepcopy(_composed(overrides or RUN))
    OmegaConf.set_struct(config, False)
    for key, value in values.items():
        OmegaConf.update(config, key.replace("__", "."), value, merge=False)
    return config


def message(config, typed=()):
    with pytest.raises(UserError) as caught:
        validate.check(config, typed, CHOICES)
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)


# --- valid configurations


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_composes_and_passes(name):
    teacher = ["reference.name_or_path=tiny"] if name == "gkd" else []
    config = validate.check(composed(f"loss={name}", *teacher, *RUN[1:]))
    assert isinstance(config, Config)
    assert config.objective.mode in ("min", "max")
    assert config.optim["lr"] == config.optim["lr_from_scratch"]["none"]  # model=tiny; else the loss's own


OF_ONES_OWN = {"optim": {"optim___target_": "halos.optimizers.standard.sgd"},
               "schedule": {"schedule": {"_target_": "halos.schedules.constant", "warmup": 0.1}}}  # fmt: skip


@pytest.mark.parametrize("group", [g for g in CHOICES if g not in ("loss", "experiment", "hydra")])
def test_every_choice_of_every_group_composes_and_passes(group, tmp_path, monkeypatch):
    monkeypatch.setattr("halos.optimizers.adamw8bit.find_spec", lambda name: object())  # as if it were installed
    for choice in CHOICES[group]:
        fill = {"data__root": str(tmp_path)} if choice == "gsm8k" else {}
        fill |= {"data__train": ["org/a"], "data__eval": []} if choice == "files" else {}
        fill |= {"data__train": ["org/a"]} if choice in ("alpacaeval", "wildbench") else {}  # for evaluation alone
        fill |= {"model__name_or_path": "org/name"} if choice == "path" else {}
        fill |= OF_ONES_OWN[group] if choice == "own" else {}
        validate.check(composed(*(one for one in RUN if not one.startswith(f"{group}=")), f"{group}={choice}", **fill))


def test_a_loss_may_override_values_of_the_model():
    assert validate.check(composed("loss=csft", *RUN[1:])).model.add_tokens == ["<|good|>", "<|bad|>"]


def test_the_checked_config_holds_plain_values():
    config = validate.check(composed(data__train=["org/a", {"path": "org/b", "weight": 2}], data__eval=[]))
    assert type(config.data.train) is list
    assert type(config.data.train[1]) is dict
    assert type(config.loss) is dict


def test_a_tilde_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text("{}")
    config = validate.check(composed(cache_dir="~/c", data__train=["~/a.jsonl"], data__eval=[{"path": "~/a.jsonl"}]))
    assert config.cache_dir == f"{tmp_path}/c"
    assert config.data.train == [f"{tmp_path}/a.jsonl"]
    assert config.data.eval == [{"path": f"{tmp_path}/a.jsonl"}]


def test_a_saved_config_is_read_back_unchanged_without_interpolation(monkeypatch):
    monkeypatch.setenv("ELSE", "read from the environment")
    config = validate.check(
        composed(model__chat_template="{{ x }} \\${oc.env:ELSE} \\\\\\${y}", plugins=["yaml"], overwrite=True)
    )
    assert config.model.chat_template == "{{ x }} ${oc.env:ELSE} \\${y}"
    again = validate.check(
        run_config.compose_for_resume(run_config.load(run_config.dump(config), {}, "here/demo"), "here/demo", "here/demo")
    )
    assert (again.run_dir, again.resume, again.plugins, again.overwrite) == ("here/demo", "here/demo", [], False)
    again.run_dir, again.resume, again.plugins, again.overwrite = config.run_dir, None, config.plugins, True
    assert again == config


# --- invalid ones: (changes to a valid run, parts of the message)

WRONG = [
    ({"train__stepz": 3}, ["train.stepz", "did you mean train.steps?"]),
    ({"batch_size": 8}, ["'batch_size'", "did you mean train.batch_size?"]),
    ({"nonsense": 8}, ["'nonsense'", "--help"]),
    ({"train__nonsense": 8}, ["train.nonsense", "train takes", "max_length"]),
    ({"loss__betta": 8}, ["loss.betta", "dpo takes no 'betta'", "did you mean beta?"]),
    ({"checkpoint__evry": 8}, ["checkpoint.evry", "did you mean every?"]),
    ({"train__steps": "abc"}, ["train.steps takes a whole number or null, not 'abc'"]),
    ({"train__steps": 1.5}, ["train.steps", "not 1.5"]),
    ({"train__steps": 0}, ["train.steps takes a whole number (at least 1) or null, not 0"]),
    ({"train__eval_at_start": "maybe"}, ["train.eval_at_start takes true or false, not 'maybe'"]),
    ({"train__activation_checkpointing": 7}, ["train.activation_checkpointing takes true or false or null, not 7"]),
    ({"train__truncation": "cut"}, ["train.truncation takes drop, truncate, error, not 'cut'"]),
    ({"model__quantize": "3bit"}, ["model.quantize takes 4bit, 8bit or null, not '3bit'"]),
    ({"peft__name": "lora2"}, ["peft.name", "did you mean lora?"]),
    ({"optim__lr": "fast"}, ["optim.lr takes a number (above 0 and at most 1e+30), not 'fast'"]),
    ({"optim__lr": 0}, ["optim.lr takes a number (above 0 and at most 1e+30), not 0"]),
    ({"optim__lr": float("nan")}, ["optim.lr", "not nan"]),
    ({"optim__lr": float("inf")}, ["optim.lr", "not inf"]),
    ({"train__steps": "${seed}"}, ["train.steps takes a whole number (at least 1) or null, not 0"]),
    ({"optim__lr": None}, ["optim.lr takes a number (above 0 and at most 1e+30), not null"]),
    (
        {"optim__betas": [0.9]},
        ["optim.betas takes [a number (at least 0 and below 1), a number (at least 0 and below 1)]", "[0.9]"],
    ),
    ({"optim__betas": ["a", "b"]}, ["optim.betas takes [a number", "not ['a', 'b']"]),
    ({"optim__betas": [0.9, 1.0]}, ["optim.betas takes [a number", "not [0.9, 1.0]"]),
    ({"optim__beta": 0.9}, ["optim.beta: adamw takes no 'beta'; it takes lr", "did you mean betas?"]),
    ({"optim__name": "muon"}, ["optim.name takes adamw, adam, sgd, rmsprop, not 'muon'", "optim=muon"]),
    ({"optim___target_": None}, ["optim._target_ takes a dotted path such as halos.optimizers.standard.adamw, not null"]),
    ({"optim___target_": "myoptim.lion"}, ["optim._target_ is myoptim.lion, outside halos", "plugins=[myoptim]"]),
    ({"optim__loraplus_lr_ratio": 16}, ["optim.loraplus_lr_ratio=16 applies to LoRA's B matrices", "peft=lora"]),
    ({"optim__lr_by_name": {"(": 1e-3}}, ["optim.lr_by_name: '(' is no regular expression"]),
    ({"optim__lr_by_name": {"head": -1}}, ["optim.lr_by_name: the learning rate of 'head' must be a number from 0 up, not -1"]),
    ({"schedule__warmup": -1}, ["schedule.warmup takes a number (at least 0 and whole from 1), not -1"]),
    ({"schedule__decay": 0.1}, ["schedule.decay: cosine takes no 'decay'; it takes warmup, final"]),
    ({"schedule__name": "wsd"}, ["schedule.name takes constant, linear, cosine, not 'wsd'", "schedule=wsd"]),
    ({"peft__rank_pattern": {"q": "x"}}, ["peft.rank_pattern.q takes a whole number, not 'x'"]),
    ({"seed": "???"}, ["seed is missing: it takes a whole number"]),
    ({"seed": "${nope}"}, ["seed is ${nope}", "cannot be resolved"]),
    ({"optim__lr": "${oc.env:NOT_THERE}"}, ["optim.lr is ${oc.env:NOT_THERE}", "cannot be resolved"]),
    ({"reference": "x"}, ["reference takes a mapping, not 'x'"]),
    ({"loss": None}, ["loss is missing", "dpo", "kto"]),
    ({"model__name_or_path": None}, ["model.name_or_path is missing", "tiny", "model.name_or_path="]),
    ({"data__train": None}, ["data.train is missing", "arithmetic", "data.train=["]),
    ({"data__eval": None}, ["data.eval is missing", "data.eval=[]"]),
    ({"data__train": "a.jsonl"}, ["data.train takes a list", "data.train=[a.jsonl]"]),
    ({"data__train": []}, ["data.train is []"]),
    ({"exp_name": None}, ["exp_name is missing", "exp_name=demo"]),
    *(({"exp_name": name}, ["exp_name", repr(name)]) for name in ("a/b", "..", ".a", "-a", "", " a", "a\nb", "a\\b")),
    ({"train__steps": None, "train__epochs": None}, ["train.steps", "train.epochs", "train.steps=100"]),
    ({"reference__name_or_path": "a/b", "loss": {"_target_": "halos.losses.sft.sft"}}, ["reference.name_or_path", "loss=sft"]),
    ({"model__quantize": "4bit"}, ["model.quantize=4bit", "peft=lora"]),
    ({"model__add_tokens": ["<x>"], "peft__name": "lora"}, ["model.add_tokens", "peft.modules_to_save=[embed_tokens,lm_head]"]),
    ({"train__early_stopping": 2, "data__eval": []}, ["train.early_stopping=2", "data.eval"]),
    ({"checkpoint__keep_best": 2, "data__eval": []}, ["checkpoint.keep_best=2", "data.eval"]),
    ({"train__early_stopping": 2, "train__eval_every": None}, ["train.early_stopping=2", "train.eval_every"]),
    ({"objective__metric": "loss"}, ["objective.metric=loss is better low, and objective.mode is max: add objective.mode=min"]),
    ({"data__eval": [{"path": "arithmetic", "weight": 2}]}, ["data.eval: weight=2 has no effect", "leave it out"]),
    ({"plugins": ["no_such_package"]}, ["no_such_package", "PYTHONPATH"]),
    ({"hooks__x": {"_target_": "os.system"}}, ["hooks.x._target_", "plugins=[os]"]),
    ({"data__train": ["no.jsonl"]}, ["data.train.0", "no.jsonl"]),
    ({"data__eval": [{"path": "./dir"}]}, ["data.eval.0", "./dir"]),
    ({"data__train": ["arithmetc"]}, ["data.train.0", "arithmetc", "org/name", "arithmetic"]),
    ({"data__train": {"path": "a.jsonl"}}, ["data.train takes a list, not {path: 'a.jsonl'}: write 'data.train=[...]'"]),
    ({"data__columns": ["prompt"]}, ["data.columns takes a mapping, not ['prompt']: write 'data.columns={NAME: VALUE}'"]),
    ({"data__root": "/no/such"}, ["data.root", "/no/such"]),
    ({"data__train": [{"path": None, "format": "gsm8k"}]}, ["data.root=DIRECTORY"]),
    ({"model__name_or_path": "smolm2"}, ["model.name_or_path", "model=smollm2", "org/name"]),
    ({"model__name_or_path": "./none"}, ["model.name_or_path", "./none"]),
    ({"reference__name_or_path": "./none"}, ["reference.name_or_path", "./none"]),
    ({"model__chat_template": "none.jinja"}, ["model.chat_template", "none.jinja"]),
    ({"hooks__x": {"_target_": "a.b", "api_key": "x"}}, ["hooks.x.api_key", "WANDB_API_KEY"]),
    ({"data__train": [{"path": "a/b", "hf_token": "x"}]}, ["data.train.0.hf_token", "HF_TOKEN"]),
]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["objective.metric=kl"], ["objective.metric=kl is better low", "objective.mode=min"]),
        (["loss=reward", "train.temperature=0.5"], ["train.temperature has no effect with loss=reward"]),
        (["loss=prm", "train.temperature=0.5"], ["train.temperature has no effect with loss=prm"]),
        (["loss=dpo", "data.score=all"], ["data.score=all is of conversations (messages), and loss=dpo learns from pairs"]),
        (["loss=prm", "loss.separator=''"], ["loss prm: separator is empty"]),
        (["loss=dpo", "reference.revision=main"], ["reference.revision=main has no effect without reference.name_or_path"]),
        ([*LIVE, "online.sampler.url=http://x/v1"], ["online.sampler.url has no effect with online.sampler.name=hf"]),
        ([*LIVE, "online.sampler.name=openai", "online.sampler.url=http://x", "online.sampler.top_k=5"], ["top_k has no effect"]),
        ([*LIVE, "online.reference=last"], ["online.reference=last: in a live loop"]),
        ([*LIVE, "+loss.beta=0.1"], ["online.overrides=[loss.beta=0.1]"]),
        ([*LIVE, "online.num_processes=2"], ["online.num_processes=2 is of rounds"]),
        ([*LIVE, "data.train=[{path: arithmetic, weight: 3}]"], ["data.train: weight=3", "loss=online", "leave it out"]),
        (["loss=sft", "objective.metric=logps/completion"], ["objective.metric=logps/completion would be minimised", "mode=max"]),
        (["train.steps=3", "train.epochs=2"], ["train.steps=3 and train.epochs=2 are two lengths of one run: give one"]),
        (["train={steps: 3, epochs: 2}"], ["train.steps=3 and train.epochs=2 are two lengths of one run: give one"]),
        (["loss=sft", "reference.cache=always"], ["reference.cache=always keeps the", "loss=sft uses no reference"]),
        (["loss=grpo", "loss.beta=0", "reference={cache: always}"], ["reference.cache=always keeps", "loss=grpo uses no"]),
        (["peft=lora", "peft.alpha_pattern={q_proj: -1}"], ["peft.alpha_pattern.q_proj takes a number (above 0), not -1"]),
        (["loss=ppo", "loss.kl_coefficient=0", "loss.kl_target=3"], ["loss ppo: loss.kl_target=3", "0 stays 0"]),
        (["loss=mixture", "loss.parts={loss: {loss: sft, weight: 1}}"], ["a part cannot be named loss"]),
        (["reference.adapter=start"], ["reference.adapter has no effect with peft=none"]),
        (["checkpoint.merge_dtype=bfloat16"], ["checkpoint.merge_dtype=bfloat16 is of merged weights", "--dtype bfloat16"]),
        (["peft={lora_alpha: 8,r:8}"], ["peft.lora_alpha has no effect with peft=none"]),
        (["checkpoint.keep_best=3", "checkpoint.every=null"], ["checkpoint.keep_best=3", "checkpoint.every is null"]),
        (
            ["checkpoint.pinned=[5,30,40]", "train.steps=20"],
            ["checkpoint.pinned has 30, 40", "ends at step 20", "steps up to 20"],
        ),
        (
            ["checkpoint.keep_best=3", "train.eval_every=null"],
            ["checkpoint.keep_best=3 chooses by evaluations", "eval_every is null"],
        ),
        (
            [*ROLLOUTS, "train.early_stopping=2", "train.eval_every=5"],
            ["early_stopping=2 watches objective.metric=reward", "never changes", "metric=loss"],
        ),
        ([*ROLLOUTS, "checkpoint.keep_best=1"], ["keep_best=1 watches objective.metric=reward", "never changes", "mode=min"]),
        (["train.early_stopping=2", "train.steps=200"], ["train.early_stopping=2 acts at evaluation 3", "gives 2 before"]),
    ],
)
def test_what_is_typed_and_would_never_act_is_refused(typed, words):
    said = message(composed(*RUN, *typed), typed)
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    "typed",
    [
        ["loss=sft", "data.score=all"],
        ["loss=dpo", "data.score=last"],
        ["objective.metric=kl", "objective.mode=max"], ["objective.metric=loss", "objective.mode=min"],
        [*LIVE, "online.sampler.cache_tokens=999", "online.reference=start", "online.config_file=null"],
        ["loss=sft", "objective.metric=perplexity"], ["loss=sft", "objective.metric=kl", "objective.mode=min"],
        ["train.steps=null", "train.epochs=2"], ["checkpoint.keep_best=3", "checkpoint.every=null", "checkpoint.pinned=[5]"],
        ["train.early_stopping=2", "train.steps=201"], ["loss=sft", "reference.cache=auto"],
        ["loss=sft", "reference.cache=never"], ["checkpoint.pinned=[20]", "train.steps=20"],
        [*ROLLOUTS, "checkpoint.keep_best=1", "objective.metric=loss", "objective.mode=min"],
        [*ROLLOUTS, "checkpoint.keep_best=1", "objective.metric=gen/reward", "objective.mode=max"],  # of a hook
        [*LIVE, "checkpoint.keep_best=1"], [*ROUNDS, "checkpoint.keep_best=1"],
        ["peft=lora", "peft.alpha_pattern={q_proj: 0}", "resume=runs/begun_before"],
    ],
)  # fmt: skip
def test_what_is_typed_and_acts_is_accepted(typed):
    validate.check(composed(*RUN, *typed), typed, CHOICES)


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=lambda part: str(part)[:60] if isinstance(part, dict) else "")
def test_wrong_input_is_refused_with_the_key_and_the_remedy(changes, words):
    said = message(composed(**changes))
    for word in words:
        assert word in said


def test_a_misspelt_file_name_is_corrected_from_its_neighbours(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    assert "did you mean train.jsonl?" in message(composed(data__train=["trian.jsonl"]))


def test_a_batch_smaller_than_the_number_of_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "train.batch_size=8" in message(composed(train__batch_size=7))
    validate.check(composed(train__batch_size=8, train__microbatch_size=64))


def test_peft_keys_without_peft_are_refused_only_as_overrides():
    said = message(composed(peft__r=8), ["peft.r=8"])
    assert "peft.r" in said
    assert "peft=lora" in said
    validate.check(composed(*RUN, "peft=lora", peft__r=8), ["peft=lora", "peft.r=8"])


def test_quantize_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr("halos.config.cross_checks.find_spec", lambda name: None)
    assert "pip install bitsandbytes" in message(composed(*RUN, "peft=lora", model__quantize="4bit"))


def test_added_tokens_pass_with_the_embedding_saved():
    validate.check(composed(*RUN, "peft=lora", model__add_tokens=["<x>"], peft__modules_to_save=["model.embed_tokens"]))


# --- models on this disk


@pytest.fixture
def model(tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").write_bytes(b"")
    return place


def test_a_model_directory_with_safetensors_passes(model):
    validate.check(composed(model__name_or_path=str(model)))


def test_a_gguf_file_passes_and_any_other_file_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"")
    (tmp_path / "a.pt").write_bytes(b"")
    validate.check(composed(model__name_or_path="a.gguf"))
    assert "only a .gguf file can be a model" in message(composed(model__name_or_path="a.pt"))


def test_a_directory_without_a_config_is_no_model(model):
    (model / "config.json").unlink()
    assert "no config.json" in message(composed(model__name_or_path=str(model)))
    (model / "adapter_config.json").write_text("{}")
    assert "halos.checkpoint merge" in message(composed(model__name_or_path=str(model)))
    (model / "FINAL").mkdir()
    (model / "FINAL" / "config.json").write_text("{}")
    assert f"{model}/FINAL" in message(composed(model__name_or_path=str(model)))


def test_a_model_without_weights_is_refused_and_pickles_are_never_read(model):
    (model / "model.safetensors").unlink()
    assert "*.safetensors is missing" in message(composed(model__name_or_path=str(model)))
    (model / "pytorch_model.bin").write_bytes(b"")
    said = message(composed(model__name_or_path=str(model)))
    assert "nothing is unpickled" in said
    assert "safetensors" in said


def test_a_missing_shard_is_named(model):
    shards = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(shards))
    assert "model-00002-of-00002.safetensors" in message(composed(model__name_or_path=str(model)))


# --- writable directories


def test_a_run_directory_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "run_dir" in message(composed(run_dir="file/x"))


def test_a_full_disk_is_refused(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9, 10**6))
    said = message(composed())
    assert "run_dir" in said
    assert "only 1 MB are free" in said


def test_a_directory_without_permission_is_refused(monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, how: False)
    assert "run_dir: no permission" in message(composed())


# --- secrets


def test_the_value_of_a_secret_variable_is_refused_and_never_shown(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "tk_0123456789abcdefghij")
    for config in (
        composed(exp_name="tk_0123456789abcdefghij"),
        composed(exp_name="${oc.env:MY_TOKEN}"),
        composed(model__chat_template="see tk_0123456789abcdefghij"),
        composed(model__dtype="tk_0123456789abcdefghij"),
    ):
        said = message(config)
        assert "MY_TOKEN" in said
        assert "tk_0123" not in said
    assert "tk_0123" not in message(composed(), ["hydra.job.name=tk_0123456789abcdefghij"])


def test_short_values_and_other_variables_are_no_secrets(monkeypatch):
    monkeypatch.setenv("SORT_KEY", "demo")
    monkeypatch.setenv("SOME_NAME", "a-long-enough-name")
    validate.check(composed(exp_name="demo"))
    validate.check(composed(exp_name="a-long-enough-name"))
    validate.check(composed(*RUN, "logging=wandb", hooks__wandb__entity=None))


@pytest.mark.parametrize("secret", ["http://alice:hunter2pass@host/v1", "https://host/v1?api_key=hunter2pass"])
def test_a_url_with_a_password_or_a_token_is_refused_and_never_shown(secret):
    for said in (
        message(composed(online__scorer__url=secret)),
        message(composed(hooks__mine={"urls": [secret]})),
        message(composed(), [f"+hooks.mine.url={secret}"]),
        message(composed(), [f"online.scorer.url=http://host,{secret}"]),
    ):
        assert re.match(r"(online\.scorer\.url|hooks\.mine\.urls?(\.0)?) holds a .* in a URL, and would be saved", said)
        assert "OPENAI_API_KEY" in said
        assert "hunter2" not in said


@pytest.mark.parametrize("name", ["wandb_api_key", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "client_secret"])
def test_a_key_that_is_named_as_a_secret_is_refused_whatever_the_environment_has(name):
    for said in (message(composed(hooks__mine={name: "abc"})), message(composed(), [f"hydra.job.env_set.{name}=abc"])):
        assert name in said
        assert "abc" not in said


def test_messages_hide_secrets(monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "correct horse")
    assert redact("cannot read 'x=correct horse'") == "cannot read 'x=<MY_PASSWORD>'"


# --- suggestions, and unused keys


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train.batchsize", "train.batch_size"),
        ("tran.steps", "train.steps"),
        ("lr", "optim.lr"),
        ("model.lr", "optim.lr"),
        ("max_steps", "train.steps"),
        ("train.learning_rate", "optim.lr"),
        ("expname", "exp_name"),
        ("train.foo", None),
        ("qqq", None),
    ],
)
def test_the_nearest_key_is_suggested(typed, meant):
    assert nearest(typed, schema_keys()) == meant


def test_names_of_other_frameworks_map_to_existing_keys():
    for meant in OTHER_NAMES.values():
        assert kind_of(meant) in ("value", "free") or meant in CHOICES


def _keys(node, prefix=""):
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict) and kind_of(f"{prefix}{name}") == "section":
            yield from (key for key in _keys(value, f"{prefix}{name}.") if kind_of(key) != "free")


def test_yaml_and_schema_name_the_same_keys():
    own = {key for key in schema_keys() if key.partition(".")[0] == "online"}
    recorded = {"loss_choice"}  # by the composition
    assert set(_keys(OmegaConf.to_container(composed()))) == (set(schema_keys()) - own) | recorded
    assert set(_keys(OmegaConf.to_container(composed("loss=online")))) == set(schema_keys()) | recorded


@cache
def _read_in_code():
    """Return per file the pairs (owner, name) of `owner.name`, the imported classes, and the sections used as a whole."""
    files = []
    for path in [*(ROOT / "halos").rglob("*.py"), ROOT / "train.py"]:
        if path.parent.name == "config":
            continue  # checking a key is not reading it
        nodes = list(ast.walk(ast.parse(path.read_text())))
        pairs = {(node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", ""), node.attr)
                 for node in nodes if isinstance(node, ast.Attribute)}  # fmt: skip
        pairs |= {(node.value.attr, node.slice.value) for node in nodes if isinstance(node, ast.Subscript)
                  and isinstance(node.value, ast.Attribute) and isinstance(node.slice, ast.Constant)}  # fmt: skip
        imports = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "asdict"]
        files.append((pairs, imports, {call.args[0].attr for call in calls if isinstance(call.args[0], ast.Attribute)}))
    return files


BOUND = {"optim": "OptimizerSpec"}  # what a section with a target becomes where it is read


def _is_read(key):
    """Return whether a key is read: as `train.steps`, as `.steps` where the section or its class is used, or by a YAML."""
    section, _, name = key.rpartition(".")
    for pairs, imports, whole in _read_in_code():
        above, _, last = section.rpartition(".")
        has_section = (above.rpartition(".")[2] or "config", last) in pairs
        has_section |= BOUND.get(section, last.capitalize() or "Config") in imports
        if section in whole or (section or "config", name) in pairs or (has_section and any(attr == name for _, attr in pairs)):
            return True
    return any(re.search(rf"\${{[^}}]*\b{name}\b", path.read_text()) for path in CONFIG.rglob("*.yaml"))


@pytest.mark.parametrize(
    "key", [key for key in schema_keys() if kind_of(key) == "value" or key in ("loss", "checkpoint", "hooks")]
)
def test_no_key_is_unused(key):
    assert _is_read(key), f"nothing reads {key}"


def test_an_unused_key_would_be_detected():
    assert not _is_read("train.nobody_reads_this")
    assert not _is_read("online.sampler.nobody_reads_this")


def test_the_keys_of_peft_are_those_of_its_own_config():
    assert {field.name for field in fields(Peft)} - {"name", "init_from"} <= {field.name for field in fields(LoraConfig)}


def test_an_override_of_epochs_wins_over_the_steps_of_a_model() -> None:
    words = ["loss=sft", "model=tiny", "data=arithmetic", "exp_name=x"]
    assert validate.check(composed(*words), words).train.steps == 200
    more = [*words, "train.epochs=3"]
    assert validate.check(composed(*more), more).train.steps is None
    both = [*more, "train.steps=7"]
    with pytest.raises(UserError, match="two lengths of one run"):
        validate.check(composed(*both), both)
