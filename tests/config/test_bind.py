"""Every loss binds from its YAML, and what a signature does not allow is refused by name."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from halos.config import suggest
from halos.config.bind import bind_hook, bind_loss, input_types
from halos.errors import UserError
from halos.types import Demonstration, Judgement, Labelled, Mismatched, Pair, PairScores, TokenLogps, ValuedRollouts

CONFIG = Path(__file__).parents[2] / "config"
LOSSES = sorted({path.stem for path in (CONFIG / "loss").glob("*.yaml")} - {"mixture"})  # which a command gives its parts
REWARD = {"_target_": "halos.losses.reward.bradley_terry"}
KTO = {"_target_": "halos.losses.kto.kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
CSFT = {"_target_": "halos.losses.csft.csft", "desirable_token": "<|good|>", "undesirable_token": "<|bad|>"}
DPO = {"_target_": "halos.losses.dpo.dpo", "beta": 0.1}
IPO = {"_target_": "halos.losses.ipo.ipo", "tau": 0.1, "average": "mean"}
SIMPO = {"_target_": "halos.losses.simpo.simpo", "beta": 2.0, "gamma": None, "gamma_over_beta": 0.5}

PLUGIN = """
from typing import Annotated, Literal
from halos.types import Pair, Range

log = open(__file__ + ".imported", "a").write("x")

def mine(policy: Pair, *, share: Annotated[float, Range(least=0, below=1)], steps: int | None, kind: Literal["a", "b"],
         flags: list[bool], on: bool, weights: dict[str, float]): ...

def lazy(policy: Pair, *, beta: float = 0.25, tau: float): ...

def forgetful(policy: Pair, statistics, *, beta: float): ...

def odd(policy: int, *, beta: float): ...

from halos.hooks import base, checkpoint

class Hook(base.Hook):
    def __init__(self, *, every: Annotated[int, Range(least=1)], name: str, loud: bool = False):
        self.every, self.name, self.loud = every, name, loud

class Child(Hook): ...

class Stranger:
    def on_step(self, run, metrics): ...

class Positional(Hook):
    def __init__(self, every, *, name: str): ...
"""
MINE = {"_target_": "toyplugin.mine", "share": 0.5, "steps": 3, "kind": "a", "flags": [], "on": True, "weights": {}}


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    path = tmp_path / "toyplugin.py"
    path.write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "toyplugin", raising=False)
    return path


def settings_of(name):
    """Return the hyperparameters of a loss's YAML, merged over those of the loss that it is a variant of, and that loss."""
    node = yaml.safe_load((CONFIG / "loss" / f"{name}.yaml").read_text())
    bases = [base for base in node.get("defaults", []) if base != "_self_"]
    before, module = settings_of(bases[0]) if bases else ({}, name)
    return {**before, **node["loss"]}, module


def test_no_loss_that_is_built_in_is_called_another() -> None:
    assert not suggest.LOSSES.keys() & {*LOSSES}
    assert not suggest.NAMESAKES.keys() & {*LOSSES}
    assert {*suggest.NAMESAKES.values()} <= {*LOSSES}


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "online"])
def test_every_loss_yaml_binds(name):
    settings, module = settings_of(name)
    spec = bind_loss(settings, [])
    assert spec.name == module, "the YAML and the module have one name, so that messages can say loss=name"
    assert issubclass(spec.inputs, tuple(input_types()))
    assert spec.settings.keys() == settings.keys() - {"_target_"}


def test_hyperparameters_may_make_a_reference_unnecessary():
    grpo, _ = settings_of("grpo")
    assert not bind_loss(grpo, []).needs_reference
    with_kl = bind_loss({**grpo, "beta": 0.04}, [])
    assert (with_kl.needs_reference, with_kl.takes_reference, with_kl.on_rollouts) == (True, True, True)
    ppo, _ = settings_of("ppo")
    assert (bind_loss(ppo, []).inputs, bind_loss(ppo, []).adapt is None) == (ValuedRollouts, False)
    assert not bind_loss({**ppo, "kl_coefficient": 0}, []).needs_reference


def test_a_loss_on_rollouts_needs_a_function_of_advantages(plugin):
    plugin.write_text("from halos.types import Loss, Rollouts\ndef mine(policy: Rollouts) -> Loss: ...\n")
    with pytest.raises(UserError, match="takes Rollouts, but toyplugin has no function `advantages`"):
        bind_loss({"_target_": "toyplugin.mine"}, ["toyplugin"])


def test_a_signature_decides_what_the_run_needs():
    dpo, kto, csft = bind_loss(DPO, []), bind_loss(KTO, []), bind_loss(CSFT, [])
    assert (dpo.inputs, dpo.needs_reference, dpo.statistics, dpo.examples) == (Pair, True, None, None)
    assert (kto.inputs, kto.needs_reference, kto.statistics_inputs) == (Labelled, True, Mismatched)
    assert kto.statistics is not None
    assert (csft.inputs, csft.needs_reference, csft.example_type) == (TokenLogps, False, Judgement)
    assert bind_loss({**REWARD, "centering": 0}, []).inputs is PairScores


def test_hyperparameters_reach_exactly_the_functions_that_name_them():
    csft = bind_loss(CSFT, [])
    assert csft.function.keywords == {}
    assert csft.examples.keywords == {"desirable_token": "<|good|>", "undesirable_token": "<|bad|>"}
    row = csft.examples(Judgement((), ({"role": "assistant", "content": "no"},), desirable=False))
    assert row == Demonstration((), ({"role": "assistant", "content": "<|bad|>no"},))
    assert bind_loss(KTO, []).statistics.keywords == {}


def test_a_bound_loss_computes_with_its_hyperparameters():
    def logps(value):
        return TokenLogps(torch.tensor([[value]]), torch.ones(1, 1, dtype=torch.bool))

    spec = bind_loss({**DPO, "beta": 0.5}, [])
    loss = spec.function(Pair(logps(-1.0), logps(-3.0)), Pair(logps(-2.0), logps(-2.0)))
    assert loss.values.item() == pytest.approx(math.log1p(math.exp(-0.5 * 2)), rel=1e-6)


@pytest.mark.parametrize("text", ["5e-7", "1e-5", 1, 0.5])
def test_numbers_may_be_whole_or_written_as_text(text):
    value = bind_loss({**DPO, "beta": text}, []).settings["beta"]
    assert isinstance(value, float)
    assert value == float(text)


REFUSED = [
    (DPO | {"betta": 1}, ["loss.betta", "dpo takes no 'betta'; it takes beta (did you mean beta?)"]),
    ({"_target_": DPO["_target_"]}, ["loss.beta is missing", "a number (above 0)"]),
    (DPO | {"beta": 0}, ["loss.beta takes a number (above 0), not 0"]),
    (DPO | {"beta": True}, ["loss.beta takes a number", "not true"]),
    (DPO | {"beta": "much"}, ["loss.beta takes a number", "not 'much'"]),
    (DPO | {"beta": None}, ["loss.beta", "not null"]),
    (DPO | {"beta": math.nan}, ["loss.beta", "not nan"]),
    (DPO | {"beta": math.inf}, ["loss.beta", "not inf"]),
    (DPO | {"beta": {"x": 1}}, ["loss.beta", "not {x: 1}"]),
    (IPO | {"average": "median"}, ["loss.average takes mean or sum, not 'median'"]),
    (SIMPO | {"gamma_over_beta": -1}, ["loss.gamma_over_beta takes a number (at least 0) or null, not -1"]),
    (SIMPO | {"gamma": 1}, ["simpo", "give one of loss.gamma and loss.gamma_over_beta"]),
    (CSFT | {"desirable_token": 5}, ["loss.desirable_token takes text, not 5"]),
    ({}, ["loss._target_ takes a dotted path"]),
    ({"_target_": "dpo"}, ["loss._target_ takes a dotted path"]),
    ({"_target_": "halos..dpo"}, ["loss._target_ takes a dotted path"]),
    ({"_target_": "halos.losses.dpo.dpoo"}, ["halos.losses.dpo has no 'dpoo'", "it has dpo"]),
    ({"_target_": "halos.losses.dpoo.dpo"}, ["there is no module halos.losses.dpoo"]),
    ({"_target_": "halos.losses.common.pair_metrics"}, ["is no loss"]),
    ({"_target_": "os.system"}, ["outside halos", "plugins=[os]"]),
    ({"_target_": "halosx.losses.dpo"}, ["outside halos", "plugins=[halosx]"]),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_keys_that_a_loss_does_not_take_are_refused_with_a_remedy(settings, words):
    with pytest.raises(UserError) as caught:
        bind_loss(settings, [])
    for word in words:
        assert word in str(caught.value)


def test_a_plugin_is_imported_only_when_it_is_passed(plugin):
    with pytest.raises(UserError, match=r"plugins=\[toyplugin\]"):
        bind_loss(MINE, [])
    assert not plugin.with_name("toyplugin.py.imported").exists()
    assert bind_loss(MINE, ["toyplugin"]).settings["share"] == 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"share": 1}, "loss.share takes a number (at least 0 and below 1), not 1"),
        ({"steps": 1.5}, "loss.steps takes a whole number or null, not 1.5"),
        ({"steps": True}, "loss.steps takes a whole number or null, not true"),
        ({"kind": "c"}, "loss.kind takes a or b, not 'c'"),
        ({"flags": [1]}, "loss.flags takes a list, not [1]"),
        ({"on": 1}, "loss.on takes true or false, not 1"),
        ({"weights": {"x": "y"}}, "loss.weights takes a mapping, not {x: 'y'}"),
    ],
)
def test_each_kind_of_annotation_is_checked(plugin, change, words):
    with pytest.raises(UserError) as caught:
        bind_loss(MINE | change, ["toyplugin"])
    assert words in str(caught.value)


def test_null_and_whole_numbers_fit_where_the_annotation_says_so(plugin):
    change = {"steps": None, "flags": [True], "weights": {"x": 1}, "share": "0.25"}
    settings = bind_loss(MINE | change, ["toyplugin"]).settings
    assert settings == {"share": 0.25, "steps": None, "kind": "a", "flags": [True], "on": True, "weights": {"x": 1.0}}


def test_a_loss_with_statistics_needs_the_function(plugin):
    with pytest.raises(UserError, match="no function of that name"):
        bind_loss({"_target_": "toyplugin.forgetful", "beta": 1.0}, ["toyplugin"])


def test_a_default_in_the_signature_of_a_loss_is_that_of_its_key(plugin):
    mine = {"_target_": "toyplugin.lazy", "tau": 1}
    assert bind_loss(mine, ["toyplugin"]).settings == {"beta": 0.25, "tau": 1.0}
    assert bind_loss({**mine, "beta": 2}, ["toyplugin"]).settings["beta"] == 2.0
    with pytest.raises(UserError, match=r"loss\.tau is missing"):
        bind_loss({"_target_": "toyplugin.lazy"}, ["toyplugin"])


def test_a_function_of_another_type_is_no_loss(plugin):
    with pytest.raises(UserError, match="is no loss"):
        bind_loss({"_target_": "toyplugin.odd", "beta": 1.0}, ["toyplugin"])


def test_a_hook_is_constructed_from_its_keys(plugin):
    for name in ("Hook", "Child"):
        hook = bind_hook("hooks.mine", {"_target_": f"toyplugin.{name}", "every": "3", "name": "n"}, ["toyplugin"])()
        assert (hook.every, hook.name, hook.loud) == (3, "n", False)
    assert bind_hook("hooks.mine", {"_target_": "toyplugin.Hook", "every": 3, "name": "n", "loud": True}, ["toyplugin"])().loud


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"_target_": "toyplugin.Hook", "every": 0, "name": "n"}, "hooks.mine.every takes a whole number (at least 1), not 0"),
        (
            {"_target_": "toyplugin.Hook", "evry": 1, "name": "n"},
            "Hook takes no 'evry'; it takes every, name, loud (did you mean every?)",
        ),
        ({"_target_": "toyplugin.Hook", "every": 1}, "hooks.mine.name is missing"),
        ({"_target_": "toyplugin.Child", "every": 0, "name": "n"}, "hooks.mine.every takes a whole number (at least 1), not 0"),
        ({"_target_": "toyplugin.Positional", "name": "n"}, "takes every, but a hook's parameters are keyword-only"),
        ({"_target_": "toyplugin.mine"}, "is no hook"),
        ({"_target_": "toyplugin.Stranger"}, "is no hook: derive a class from halos.hooks.base.Hook"),
        ({"_target_": "toyplugin.base"}, "is no hook"),
        ({"_target_": "toyplugin.Hok"}, "toyplugin has no 'Hok'; it has Child, Hook, Positional"),
        ({"_target_": "toyplugin.sub.Hook"}, "there is no module toyplugin.sub"),
        (3, "hooks.mine takes a mapping with a _target_"),
    ],
)
def test_keys_that_a_hook_does_not_take_are_refused(plugin, settings, words):
    with pytest.raises(UserError) as caught:
        bind_hook("hooks.mine", settings, ["toyplugin"])
    assert words in str(caught.value)


def test_the_checkpoint_node_takes_only_checkpoint_hooks(plugin):
    settings = yaml.safe_load((CONFIG / "checkpoint" / "default.yaml").read_text())
    bind_hook("checkpoint", settings, [])
    for target in ("toyplugin.Hook", "halos.hooks.base.Hook"):
        with pytest.raises(UserError, match=r"derive a class from halos\.hooks\.checkpoint\.CheckpointHook"):
            bind_hook("checkpoint", {**settings, "_target_": target}, ["toyplugin"])


@pytest.mark.parametrize("text", ["def broken(:", "from halos.types import Nothing"])
def test_a_plugin_that_cannot_be_imported_says_why(plugin, text):
    plugin.write_text(text)
    with pytest.raises(UserError, match=r"toyplugin cannot be imported: .*(invalid syntax|Nothing)"):
        bind_hook("hooks.mine", {"_target_": "toyplugin.Hook"}, ["toyplugin"])


def test_an_object_that_is_no_function_is_no_loss(plugin):
    for target in ("toyplugin.base", "toyplugin.Hook", "halos.losses.dpo.Loss"):
        with pytest.raises(UserError, match="is no loss"):
            bind_loss({"_target_": target}, ["toyplugin"])


def test_a_missing_third_party_package_is_named(plugin):
    plugin.write_text("import surely_not_installed\nclass Hook: ...")
    with pytest.raises(UserError, match="pip install surely_not_installed"):
        bind_hook("hooks.mine", {"_target_": "toyplugin.Hook"}, ["toyplugin"])
