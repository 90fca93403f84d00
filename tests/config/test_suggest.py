"""Names of keys elsewhere: a message says what they are called here."""

import re
from pathlib import Path

import pytest

from halos.config import suggest
from halos.config.mixture_parts import defaults_of
from halos.errors import UserError
from halos.repository import PACKAGES
from tests.composed import config_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("typed", "said"), [
    ("loss_type=ipo", "a loss is a choice, loss=dpo (TRL's sigmoid)"),
    ("label_smoothing=0.1", "it is loss.label_smoothing of loss=cdpo, robust, exo, aot or aot_unpaired"),
    ("loss.label_smoothing=0.1", "it is loss.label_smoothing of loss=cdpo"),
    ("desirable_weight=1.3", "it is loss.desirable_weight of loss=kto"),
    ("cpo_alpha=1", "it is loss.alpha of loss=cpo"),
    ("loss.simpo_gamma=1", "it is loss.gamma of loss=simpo"),
    ("gamma_beta_ratio=0.5", "it is loss.gamma_over_beta of loss=simpo"),
    ("rpo_alpha=1", "it is loss.alpha of loss=rpo"),
    ("ld_alpha=0.5", "it is loss.alpha of loss=ld_dpo"),
    ("clip_ratio_c=3", "it is loss.dual_clip of loss=grpo"),
    ("train.vllm_importance_sampling_clip_min=0.5", "did you mean train.correction_floor?"),
    ("discopop_tau=0.05", "it is loss.tau of loss=discopop"),
    ("loss.use_weighting=true", "it is a loss of its own, loss=wpo"),
    ("precompute_ref_log_probs=true", "reference.cache=always computes the reference's log-probs once"),
    ("max_prompt_length=512", "train.max_length bounds prompt and completion together"),
    ("per_device_train_batch_size=4", "train.batch_size is global"),
    ("sync_ref_model=true", "did you mean reference.sync_every?"),
    ("loss_weights=[1,1]", "it is loss.parts of loss=mixture"),
    ("f_alpha_divergence_coef=0.5", "it is 1 - loss.alpha, with loss=f_dpo"),
    ("report_to=wandb", "a tracker is a choice, logging=wandb or logging=tensorboard"),
    ("use_peft=true", "LoRA is a choice, peft=lora"),
])  # fmt: skip
def test_a_key_of_another_framework_is_named_as_it_is_here(typed: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of("loss=dpo", "model=tiny", "data=arithmetic", "exp_name=demo", typed)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def _rows() -> list[tuple[str, str]]:
    """The manual's table of keys elsewhere: each of them, with the cell that says what it is here."""
    table = (ROOT / "config" / "README.md").read_text().partition("| there | here |")[2].partition("\n\n")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return [(word, here) for there, here in cells for word in re.findall(r"`(\w+)", there)]


@pytest.mark.parametrize(("word", "here"), _rows())
def test_a_key_in_the_manuals_table_is_refused_with_a_name_that_the_table_has(word: str, here: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of("loss=dpo", "model=tiny", "data=arithmetic", "exp_name=demo", f"{word}=1")
    said = str(caught.value)
    names = re.findall(r"`([a-z_.]+)", here)
    assert "there is no key" in said
    assert any(name in said for name in [*names, *(["always"] if here.startswith("always") else [])]), said
    for name in names:
        if "." in name:
            assert suggest.kind_of(name) != "unknown", name


def test_a_key_of_the_chosen_loss_that_has_another_name_elsewhere_is_meant() -> None:
    """Not the most similar name: f_dpo has alpha and divergence, cpo has alpha and beta."""
    for loss, typed, ours in (("cpo", "cpo_alpha", "alpha"), ("simpo", "gamma_beta_ratio", "gamma_over_beta"),
                              ("f_dpo", "f_divergence_type", "divergence"), ("ppo", "lam", "gae_lambda")):  # fmt: skip
        with pytest.raises(UserError, match=f"takes no '{typed}'; .*did you mean {ours}?"):
            config_of(f"loss={loss}", "model=tiny", "data=arithmetic", "exp_name=demo", f"loss.{typed}=1")


def test_every_key_that_is_suggested_for_a_loss_is_one_of_it() -> None:
    for key, losses in suggest.OF_LOSSES.values():
        for loss in losses.replace(" or ", ", ").split(", "):
            assert key in defaults_of(loss), (key, loss)


def test_what_is_not_built_in_has_its_reason_where_the_message_says() -> None:
    (table,) = re.findall(r"## Not built in, and why\n\n(.*?)\n\n", (PACKAGES / "halos/losses/README.md").read_text(), re.S)
    papers = dict(re.findall(r"^\| `(\w+)` \| \[([\d.]+)\]", table, re.M))
    assert {name: f"arXiv:{paper}" for name, paper in papers.items()} == suggest.LOSSES
    assert "README.md says why under Not built in" in str(suggest.about_loss("Nash-MD"))
