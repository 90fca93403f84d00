"""How large a round is by default, and which learning rate its training has."""

from pathlib import Path

import pytest

import train
from halos.cli.compose import ConfigTree
from halos.cli.online import compose_inner, live_config, overrides_of_rounds, round_config
from halos.config import validate
from halos.config.bind import bind_loss
from halos.errors import UserError
from halos.models import tiny
from halos.online.plan import OnlinePlan
from halos.online.round_size import RoundSize

BASE = ["loss=online", "model=tiny", "data=arithmetic", "exp_name=x"]


def size(*words: str, available: int = 5000) -> tuple[int, int]:
    """Prompts and optimizer steps of a round."""
    tree = ConfigTree()
    config = validate.check(tree.compose([*BASE, *words]), [*BASE, *words], tree.choices)
    assert config.online is not None
    inner = round_config(config, overrides_of_rounds([*BASE, *words], config, tree)[0], tree)
    loss, length = bind_loss(inner.loss, []), any(word.startswith(("train.steps", "train.epochs")) for word in words)
    kind = config.online.feedback.kind if config.online.feedback.kind != "auto" else loss.inputs.feedback
    made = RoundSize.of(config.online, inner, loss, kind, available=available, length_is_set=length)
    return made.prompts, made.steps


@pytest.mark.parametrize(
    ("words", "prompts", "steps"),
    [
        (["online.loss=dpo"], 512, 8),  # a pair of each prompt, 64 in a step
        (["online.loss=dpo", "online.feedback.pairing=random"], 128, 8),  # 4 pairs
        (["online.loss=grpo"], 64, 8),  # 8 groups of 8 in a step
        (["online.loss=grpo", "online.samples_per_prompt=10"], 48, 8),  # 6 whole groups
        (["online.loss=ppo"], 16, 8),  # 2 steps in each of 4 passes
        (["online.loss=kto"], 32, 8),  # of 32 labels
        (["online.loss=kto", "online.feedback.kind=pairwise"], 128, 8),  # a pair is two labels
        (["online.loss=grpo", "online.steps_per_round=3"], 24, 3),
        (["online.loss=grpo", "train.steps=20"], 160, 20),
        (["online.loss=grpo", "train.epochs=2"], 32, 8),
        (["online.loss=grpo", "online.prompts_per_round=512"], 512, 64),
        (["online.loss=ppo", "online.prompts_per_round=512"], 512, 256),
    ],
)
def test_a_round_samples_as_many_prompts_as_fill_its_optimizer_steps(words: list[str], prompts: int, steps: int) -> None:
    assert size(*words) == (prompts, steps)


def test_a_round_of_little_data_is_as_large_as_these() -> None:
    assert size("online.loss=grpo", available=20) == (20, 3)


def test_a_batch_that_cannot_hold_a_group_is_refused_before_anything_is_sampled() -> None:
    with pytest.raises(UserError, match=r"train.batch_size=6 completions cannot hold the 8 samples of one prompt"):
        size("online.loss=grpo", "train.batch_size=6")


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        (["online.loss=dr_grpo"], 256),
        (["online.loss=dr_grpo", "online.sampler.max_new_tokens=40"], 40),
        (["online.loss=dr_grpo", "online.sampler.max_new_tokens=null", "train.max_length=96"], 96),
        (["online.loss=dr_grpo", "online.overrides=['loss.max_tokens=7']"], 7),
        (["online.loss=grpo"], None),
    ],
)
def test_dr_grpo_divides_by_the_tokens_that_sampling_may_give(words: list[str], tokens: int | None) -> None:
    tree = ConfigTree()
    config = validate.check(tree.compose([*BASE, *words]), [*BASE, *words], tree.choices)
    rounds = round_config(config, overrides_of_rounds([*BASE, *words], config, tree)[0], tree)
    assert rounds.loss["max_tokens"] == tokens
    live = [*BASE, *words, "online.steps=3"]
    assert live_config(validate.check(tree.compose(live), live, tree.choices), live, tree).loss["max_tokens"] == tokens
    (given,) = [validate.check(tree.compose(words), words, tree.choices) for words in [["loss=dr_grpo", *BASE[1:]]]]
    assert given.loss["max_tokens"] == 1024, "of a data set nothing tells how long its samples could be"


def test_rounds_and_live_loops_train_with_the_correction_of_the_online_run() -> None:
    named = {"correction": "reject", "correction_level": "geometric", "correction_cap": 1.5, "correction_floor": 0.5}
    tree, words = ConfigTree(), [*BASE, "online.loss=grpo", *(f"online.{name}={value}" for name, value in named.items())]
    config = validate.check(tree.compose(words), words, tree.choices)
    overrides, _ = overrides_of_rounds(words, config, tree)
    inner = round_config(config, overrides, tree)
    of_round = tree.compose(OnlinePlan(config, inner, overrides, bind_loss(inner.loss, [])).overrides_of(0))
    live = [*words, "online.steps=3"]
    of_loop = live_config(validate.check(tree.compose(live), live, tree.choices), live, tree)
    assert [{name: getattr(one.train, name) for name in named} for one in (of_round, of_loop)] == [named, named]


def test_the_defaults_of_a_corrections_bounds_are_accepted_without_one() -> None:
    """Online runs of earlier versions pass them on to their rounds."""
    defaults = ("correction=none", "correction_level=null", "correction_cap=2.0", "correction_floor=null")
    tree, words = ConfigTree(), [*BASE, "online.loss=grpo", *(f"online.{each}" for each in defaults)]
    online = validate.check(tree.compose(words), words, tree.choices).online
    assert online is not None
    assert online.correction == "none"


def test_a_carried_optimizer_has_a_constant_rate_with_one_warmup_unless_a_schedule_is_chosen(tmp_path: Path) -> None:
    def chosen(*words: str, tree: ConfigTree | None = None) -> tuple[str, bool]:
        tree, words = tree or ConfigTree(), ("online.loss=grpo", *words)
        config = validate.check(tree.compose([*BASE, *words]), [*BASE, *words], tree.choices)
        overrides, once = overrides_of_rounds([*BASE, *words], config, tree)
        return round_config(config, overrides, tree).schedule["_target_"].rpartition(".")[2], once

    assert chosen() == chosen("schedule.warmup=2") == ("constant", True)
    assert chosen("schedule=constant") == ("constant", False)
    assert chosen("schedule=linear") == ("linear", False)
    assert chosen("schedule.final=0.1") == ("cosine", False)
    assert chosen("online.overrides=['schedule=wsd']") == ("wsd", False)
    assert chosen("online.carry_optimizer=false") == ("cosine", False)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /schedule: linear\n")
    own = ConfigTree.of_options(None, str(tmp_path), None)
    assert chosen("experiment=mine", tree=own) == ("linear", False)


def test_the_header_says_how_many_steps_are_on_one_set_of_samples_and_warns_of_many(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*BASE, "online.loss=grpo", f"cache_dir={cache}", f"output_root={tmp_path}", "dry_run=true"]
    assert train.start([*words, "online.prompts_per_round=600"]) == 0
    said = capsys.readouterr().out
    assert "steps      up to 75 a round on one set of samples (by online.prompts_per_round)\n" in said
    assert "\n75 optimizer steps on one set of samples" in said
    assert train.start([*words, "schedule=linear"]) == 0
    said = capsys.readouterr().out
    assert "steps      up to 8 a round on one set of samples (by online.steps_per_round)\n" in said
    assert "optimizer  its state is carried over rounds; the linear schedule from its start in each\n" in said
    assert "optimizer steps on one set of samples" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["online.steps_per_round=4", "online.prompts_per_round=9"], r"online.steps_per_round has no effect with online.prompts"),
        (["online.steps_per_round=4", "train.steps=9"], r"online.steps_per_round has no effect with train.steps"),
        (["online.steps_per_round=4", "online.steps=9"], r"online.steps_per_round=4 is of rounds"),
        (
            [
                "online.sampler.max_new_tokens=null",
                "online.sampler.name=openai",
                "online.sampler.url=http://x/v1",
                "online.sampler.model=m",
            ],
            r"online.sampler.max_new_tokens null is as many tokens as a prompt leaves, and openai reads no",
        ),
        (["online.carry_optimizer=true", "online.steps=9"], r"online.carry_optimizer=True is of rounds"),
    ],
)
def test_keys_that_do_not_set_the_size_are_refused(words: list[str], said: str) -> None:
    tree = ConfigTree()
    with pytest.raises(UserError, match=said):
        validate.check(tree.compose([*BASE, "online.loss=grpo", *words]), [*BASE, *words], tree.choices)


@pytest.mark.parametrize("loop", [(), ("online.steps=3",)], ids=["rounds", "live"])
def test_a_path_within_output_root_is_that_of_the_run(loop: tuple[str, ...], tmp_path: Path, cache: Path) -> None:
    """In a recipe, and in a sweep, where nothing but the composition knows the value that was given."""
    tiny.build(tmp_path / "start" / "FINAL")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nmodel: {name_or_path: '${output_root}/start/FINAL'}\n"
    )
    words = [*BASE, "online.loss=dpo", "experiment=mine", f"output_root={tmp_path}", f"cache_dir={cache}", *loop]
    tree = ConfigTree.of_options(None, str(tmp_path), None)
    config = validate.check(tree.compose(words), words, tree.choices)
    if loop:
        assert live_config(config, words, tree).model.name_or_path == f"{tmp_path}/start/FINAL"
    else:
        overrides, _ = overrides_of_rounds(words, config, tree)
        inner = round_config(config, overrides, tree)
        plan = OnlinePlan(config, inner, overrides, bind_loss(inner.loss, []))
        assert [compose_inner(config, plan.overrides_of(0), tree).model.name_or_path, inner.model.name_or_path] == [
            f"{tmp_path}/start/FINAL"
        ] * 2
    some = ["data.train=[{path: arithmetic, split: 'train[:99]'}]", "data.eval=[{path: arithmetic, split: 'eval[:9]'}]"]
    given = ["--config-dir", str(tmp_path), *words, *some, "dry_run=true"]
    assert train.start(given) == train.start(["-m", *given, "seed=0,1"]) == 0
