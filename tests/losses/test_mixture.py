"""Mixtures: weighted sums by hand, each part with its own denominator, and as a whole the same to the bit as a part alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halos.certify.case import synthetic_case
from halos.certify.own import OwnLoss
from halos.config.bind import bind_loss
from halos.config.mixture_parts import completed
from halos.errors import UserError
from halos.losses.bco import start, update
from halos.losses.bco_pair import bco_pair
from halos.losses.dpo import dpo
from halos.losses.wpo import WeightedPair
from halos.run.available_metrics import refuse_unavailable_objective
from halos.run.lifecycle import run
from halos.trainers.base import Trainer
from halos.types import Labelled, Mismatched, Pair, PairScores, TokenLogps
from tests.trainers.test_exact_step import BATCH, step

from .samples import POLICY, REFERENCE, gradients, number, numbers, pair, softplus

H, D_W, D_L = np.array([1.5, -1.0]), np.array([0.75, -0.75]), np.array([-0.75, 0.25])
MPO = {"dpo": {"weight": 0.8, "beta": 0.1}, "bco_pair": {"weight": 0.2, "beta": 0.1}, "sft": {"weight": 1.0}}


def mixed(parts: dict[str, Any], plugins: tuple[str, ...] = ()) -> Any:
    return bind_loss({"_target_": "halos.losses.mixture.mixture", "parts": parts}, plugins)


def test_mpo_is_the_weighted_sum_of_its_parts_each_with_its_own_denominator() -> None:
    """Two pairs, whose chosen completions have 5 tokens and cost 1.75 and 2.5 nats."""
    spec = mixed(MPO)
    assert (spec.inputs, spec.needs_reference) == (Pair, True)
    policy = pair(*POLICY)
    loss = spec.function(policy, pair(*REFERENCE), spec.start)
    assert {name: part.per for name, part in loss.terms.items()} == {
        "loss/dpo": "item", "loss/bco_pair": "item", "loss/sft": "chosen_token",
    }  # fmt: skip
    parts = {name: numbers(part).sum() for name, part in loss.terms.items()}
    by_hand = {"loss/dpo": 0.8 * softplus(-0.1 * H).sum(), "loss/sft": 4.25,
               "loss/bco_pair": 0.2 * (softplus(-0.1 * D_W) + softplus(0.1 * D_L)).sum()}  # fmt: skip
    assert parts == pytest.approx(by_hand, abs=1e-6)
    assert parts == pytest.approx({"loss/dpo": 1.092283, "loss/bco_pair": 0.549955, "loss/sft": 4.25}, abs=1e-6)
    assert number(loss.metrics["dpo/rewards/margins"]) == pytest.approx(0.025)
    assert number(loss.metrics["sft/logps/completion"]) == pytest.approx(-4.25 / 2)
    chosen, rejected = gradients(loss, policy.chosen.values, policy.rejected.values)
    assert (chosen[policy.chosen.mask] < -1).all(), "sft's is -1 a token, and the others' add to it"
    assert (rejected[policy.rejected.mask] > 0).all()


def test_a_mixture_has_the_state_of_its_parts_under_their_names() -> None:
    spec = mixed(MPO)
    assert spec.start == {f"bco_pair/{name}": 0.0 for name in start()}
    metrics = spec.function(pair(*POLICY), pair(*REFERENCE), spec.start).metrics
    totals = {name: (mean.total.item(), mean.count.item()) for name, mean in metrics.items()}
    after = spec.update(spec.start, totals)
    own = update(
        start(), {"rewards/chosen": totals["dpo/rewards/chosen"], "rewards/rejected": totals["dpo/rewards/rejected"]}, decay=1.0
    )
    assert after == {f"bco_pair/{name}": value for name, value in own.items()}
    loss = spec.function(pair(*POLICY), pair(*REFERENCE), after).terms["loss/bco_pair"]
    assert numbers(loss) == pytest.approx(0.2 * numbers(bco_pair(pair(*POLICY), pair(*REFERENCE), own, beta=0.1)), abs=1e-7)


def test_the_richest_input_type_decides() -> None:
    def weight(*names: str, **more: Any) -> dict[str, Any]:
        return {name: {"weight": 1} for name in names} | more

    assert mixed(weight("sft", "dft")).inputs is TokenLogps
    assert not mixed(weight("sft", "dft", "simpo")).needs_reference
    assert mixed(weight("dpo", "wpo", "sft")).inputs is WeightedPair
    assert mixed(weight("aot", "sft")).statistics_inputs is Pair
    kto = mixed(weight("kto", "bco"))
    assert (kto.inputs, kto.statistics_inputs) == (Labelled, Mismatched)
    assert mixed(weight("reward")).inputs is PairScores
    two = mixed({"near": {"loss": "dpo", "weight": 1, "beta": 1.0}, "far": {"loss": "dpo", "weight": 3}})
    loss = two.function(pair(*POLICY), pair(*REFERENCE))
    parts = [numbers(dpo(pair(*POLICY), pair(*REFERENCE), beta=beta)) for beta in (1.0, 0.1)]
    assert numbers(loss) == pytest.approx(parts[0] + 3 * parts[1], abs=1e-6)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, r"loss.parts takes a mapping of losses to their keys, not {}: 'loss.parts={dpo: "),
        (None, "loss.parts takes a mapping of losses to their keys, not null"),
        ({"dpoo": {"weight": 1}}, "loss.parts.dpoo: there is no loss 'dpoo' to mix; did you mean dpo"),
        ({"sigmoid": {"weight": 1}}, "loss.parts.sigmoid: there is no loss 'sigmoid' to mix; here it is loss=dpo"),
        ({"online": {"weight": 1}}, "loss.parts.online: there is no loss 'online' to mix"),
        ({"dpo": 1}, r"loss.parts.dpo takes a mapping with a weight, .*, not 1"),
        ({"dpo": {"beta": 1}}, "loss.parts.dpo takes a mapping with a weight"),
        ({"dpo": {"weight": 0}}, r"loss.parts.dpo.weight takes a number \(above 0\), not 0"),
        ({"dpo": {"weight": "much"}}, r"loss.parts.dpo.weight takes a number \(above 0\), not 'much'"),
        ({"dpo": {"weight": 1, "betta": 1}}, "loss.parts.dpo.betta: dpo takes no 'betta'; it takes beta"),
        ({"dpo": {"weight": 1, "beta": -1}}, r"loss.parts.dpo.beta takes a number \(above 0\), not -1"),
        ({"a/b": {"weight": 1, "loss": "dpo"}}, "loss.parts: a part cannot be named 'a/b'"),
        ({"dpo": {"weight": 1}, "grpo": {"weight": 1}}, "loss.parts.grpo: grpo learns from rollouts by advantages of its own"),
        ({"dpo": {"weight": 1}, "csft": {"weight": 1}}, "loss.parts.csft: csft rewrites the rows"),
        ({"dpo": {"weight": 1}, "kto": {"weight": 1}}, "fit together: dpo learns from pairs: .*; kto learns from labels"),
        ({"sft": {"weight": 1}, "kto": {"weight": 1}}, "loss.parts do not fit together: sft learns from demonstrations"),
        ({"reward": {"weight": 1}, "dpo": {"weight": 1}}, "loss.parts do not fit together"),
        ({"aot": {"weight": 1}, "aot_unpaired": {"weight": 1}}, "aot and aot_unpaired each read the whole global batch"),
    ],
)  # fmt: skip
def test_parts_that_cannot_be_mixed_are_refused_by_name(parts: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixed(parts)


def test_a_key_beside_the_parts_and_a_stranger_without_its_keys_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"loss.dpo: mixture takes no 'dpo'; it takes parts"):
        bind_loss({"_target_": "halos.losses.mixture.mixture", "parts": MPO, "dpo": {}}, [])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "strange_part.py").write_text(
        "from halos.types import Loss, Pair\ndef mine(policy: Pair, *, scale: float) -> Loss:\n"
        "    return Loss(scale * policy.chosen.sum, {})\n"
    )
    mine = {"weight": 2, "_target_": "strange_part.mine"}
    with pytest.raises(UserError, match=r"loss.parts.mine.scale is missing: strange_part takes scale"):
        mixed({"mine": mine}, ("strange_part",))
    with pytest.raises(UserError, match=r"loss.parts.mine._target_ is strange_part.mine, outside halos"):
        mixed({"mine": {**mine, "scale": 3}})
    loss = mixed({"mine": {**mine, "scale": 3}}, ("strange_part",)).function(pair(*POLICY))
    assert numbers(loss) == pytest.approx([-10.5, -15.0])


def test_what_follows_from_a_parts_metrics_stands_under_its_name() -> None:
    spec = mixed({"sft": {"weight": 2}})
    assert spec.derive({"loss": 3.0}) == {}
    assert spec.derive({"loss/sft": 3.0, "sft/nll": 1.5}) == pytest.approx({"sft/perplexity": np.exp(1.5)})
    labels = mixed({"bco": {"weight": 1}}).derive({"bco/rewards/chosen": 2.0, "bco/rewards/rejected": 0.5, "loss/bco": 1.0})
    assert labels == {"bco/rewards/margins": 1.5}


def test_the_keys_that_a_part_lacks_are_those_of_its_yaml() -> None:
    parts = completed({"parts": {"dapo": {"weight": 1, "clip_low": 0.1}, "dpo": {"weight": 1, "_target_": "mine.dpo"}}})["parts"]
    assert {name: parts["dapo"][name] for name in ("clip_low", "clip_high", "aggregation", "objective")} == {
        "clip_low": 0.1, "clip_high": 0.28, "aggregation": "token", "objective": "clip",
    }  # fmt: skip
    assert parts["dpo"] == {"weight": 1, "_target_": "mine.dpo"}, "a saved part stays as it is"
    twice = mixed({"orpo": {"weight": 3, "own_weight": 0.5}}).function(pair(*POLICY)).terms
    once = bind_loss({"_target_": "halos.losses.orpo.orpo", "weight": 0.5}, []).function(pair(*POLICY)).terms
    assert {name.replace("orpo_", ""): part.per for name, part in twice.items()} == {
        name: part.per for name, part in once.items()
    }
    assert numbers(twice["loss/orpo_odds"]) == pytest.approx(3 * numbers(once["loss/odds"]), abs=1e-6)


@pytest.mark.parametrize("loss", ["orpo", "kto"])
def test_a_part_alone_with_the_weight_1_is_the_loss_itself(loss: str, trainer: Callable[..., Trainer]) -> None:
    words = [
        "train.batch_size=11",
        "train.microbatch_size=4",
        "train.max_grad_norm=null",
        "optim.lr=1e-3",
        "reference.cache=never",
    ]
    alone = trainer(f"loss={loss}", *words, "exp_name=alone")
    part = trainer("loss=mixture", f"loss.parts={{{loss}: {{weight: 1}}}}", *words, "exp_name=part")
    saved = {"own_weight" if name == "weight" else name: value for name, value in alone.run.config.loss.items()}
    assert part.run.config.loss["parts"][loss] == {**saved, "weight": 1}
    metrics = [made.step(BATCH) for made in (alone, part)]
    values, gradients = zip(*(step(made, BATCH) for made in (alone, part)), strict=True)
    assert values[0] == values[1]
    assert torch.equal(*gradients)
    assert {f"{loss}/{name}" for name in metrics[0] if name.startswith("rewards/")} <= metrics[1].keys()
    evaluated = [made.run.last_eval for made in (alone, part) if made.evaluate() is None]
    assert evaluated[1][f"{loss}/rewards/margins"] == evaluated[0]["rewards/margins"]


def test_two_terms_of_one_name_are_refused_before_a_model_loads(configure: Callable[..., Any]) -> None:
    """ORPO has the terms nll and odds."""
    twice = "loss.parts={orpo: {weight: 1}, orpo_nll: {loss: sft, weight: 5}}"
    config = configure("loss=mixture", twice, "model.name_or_path=no/such")
    with pytest.raises(UserError, match="the term orpo_nll twice, of orpo and of orpo_nll: give orpo_nll another name"):
        run(config, [])
    with pytest.raises(UserError, match="the term orpo_nll twice, of orpo_nll and of orpo"):
        refuse_unavailable_objective(config, mixed({"orpo_nll": {"loss": "sft", "weight": 5}, "orpo": {"weight": 1}}), [])


def test_a_part_of_the_users_own_that_is_a_sum_of_losses_trains(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "summed_part.py").write_text(
        "from halos.types import Loss, TokenLogps\ndef mine(policy: TokenLogps) -> Loss:\n"
        "    return Loss.sum(one=Loss(-policy.values, {}, per='token'), two=Loss(policy.mean**2, {}))\n"
    )
    words = ["plugins=[summed_part]", "loss._target_=summed_part.mine", "train.batch_size=4"]
    parts = "loss.parts={mine: {weight: 2, _target_: summed_part.mine}, sft: {weight: 1}}"
    means = []
    for more in (["loss=sft", words[1]], ["loss=mixture", parts]):
        made = trainer(*more, words[0], words[2], f"exp_name={more[0][5:]}")
        made.evaluate()
        means.append(made.run.last_eval)
    alone, mixed_in = means
    assert "perplexity" not in alone, "its loss is another mean"
    assert mixed_in["loss/mine_one"] == pytest.approx(2 * alone["loss/one"])
    assert mixed_in["sft/perplexity"] == pytest.approx(np.exp(alone["loss/one"]))
    assert "mine/perplexity" not in mixed_in


@pytest.mark.parametrize("own", [True, False], ids=["needed", "unneeded"])
def test_a_loss_that_may_need_no_reference_gets_none_alone_and_as_a_part(
    own: bool, trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With statistics, which take what it takes. Policy and reference are equal."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "may_refer.py").write_text(
        "from halos.types import Loss, Pair\n"
        "def needs_reference(*, refers: bool) -> bool:\n    return refers\n"
        "def statistics(policy: Pair, reference: Pair | None):\n"
        "    return policy.chosen.sum - (0 if reference is None else reference.chosen.sum)\n"
        "def mine(policy: Pair, reference: Pair | None, statistics, *, refers: bool) -> Loss:\n"
        "    assert refers is (reference is not None)\n"
        "    return Loss((policy.chosen.sum - policy.rejected.sum - statistics.mean())**2, {})\n"
    )
    part = f"mine: {{weight: 1, _target_: may_refer.mine, refers: {str(own).lower()}}}"
    more = ["plugins=[may_refer]", "objective.metric=loss", "objective.mode=min", "train.batch_size=4", "train.microbatch_size=2"]
    found = []
    for run_number, words in enumerate((
        ["loss=dpo", "~loss.beta", "loss._target_=may_refer.mine", f"+loss.refers={own}"],
        ["loss=mixture", f"loss.parts={{{part}}}"],
        ["loss=mixture", f"loss.parts={{{part}, dpo: {{weight: 1}}}}"],
    )):  # fmt: skip
        made = trainer(*words, *more, f"exp_name=run{run_number}")
        made.evaluate()
        found.append(made.run.last_eval["loss/mine" if run_number else "loss"])
        made.step(made.order.batch(0))
    assert found == pytest.approx([found[0]] * 3)
    subject = OwnLoss(bind_loss({"_target_": "may_refer.mine", "refers": own}, ["may_refer"]))
    case = synthetic_case(subject)
    assert np.isfinite(subject.step(case, case.whole).total)
