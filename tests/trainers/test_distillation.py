"""Distillation in a run: the teacher's likeliest ids as data say what a teacher beside the policy does; a resume repeats it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from world import copied, resume, stopped

from halos.config.bind import bind_loss
from halos.errors import UserError
from halos.models.locate import locate
from halos.run.datasets import refuse_other_teacher
from halos.run.lifecycle import run
from halos.run.reference import decision
from halos.trainers import teacher_rows
from halos.trainers.base import Trainer
from tests import composed

from .test_exact_step import agree, step_in


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A model of another size with the tokenizer of the bundled one, and more ids than that has."""
    place, torch_state = tmp_path_factory.mktemp("teacher"), torch.random.get_rng_state()
    tokenizer = AutoTokenizer.from_pretrained(locate("tiny", None, cache))
    torch.manual_seed(5)
    size = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 24, **size))
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    model.lm_head.weight.data[-24:] = 0.0
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    torch.random.set_rng_state(torch_state)
    return place


def words(teacher: Path, *more: str) -> list[str]:
    return [
        "loss=gkd",
        f"reference.name_or_path={teacher}",
        "loss.top_k=8",
        "train.batch_size=11",
        "train.max_grad_norm=null",
        *more,
    ]


def test_what_the_cache_holds_gives_the_step_of_a_teacher_beside_the_policy_in_micro_batches_of_any_size(
    teacher: Path, trainer: Callable[..., Trainer]
) -> None:
    cached = trainer(*words(teacher, "reference.cache=always", "exp_name=cached"))
    live = trainer(*words(teacher, "reference.cache=never", "exp_name=live"))
    assert (cached.reference, cached.reference_logps is None, live.reference is None) == (None, False, False)
    agree([*(step_in(cached, size) for size in (11, 4, 1)), step_in(live, 4)])


def test_rows_with_what_a_teacher_says_train_as_its_cache_does_without_the_teacher(
    teacher: Path, trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    small = [f"data.{name}=[{{path: arithmetic, split: '{name}[:12]'}}]" for name in ("train", "eval")]
    cached = trainer(*words(teacher, *small, f"reference.export={tmp_path}", "exp_name=exporting"))
    cached.prepare_reference()
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert cached.eval_data is not None
    assert (len(lines), len((tmp_path / "eval.jsonl").read_text().splitlines())) == (
        len(cached.train.rows),
        len(cached.eval_data.rows),
    )
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:11]))
    given = [word for word in words(teacher) if not word.startswith("reference")]
    few = [f"data.train=[{tmp_path}/few.jsonl]", "data.eval=[]", "exp_name=taught"]
    taught = trainer(*given, *few)
    assert (taught.reference, taught.reference_logps) == (None, None)
    assert [item.id.rpartition(":")[2] for item in taught.train.rows] == [f"{n}#0" for n in range(1, 12)]
    assert all(
        np.array_equal(mine.completions[0].ids, theirs.completions[0].ids)
        for mine, theirs in zip(taught.train.rows, cached.train.rows, strict=False)
    )
    agree([step_in(cached, 4), *(step_in(taught, size) for size in (11, 1))])
    with pytest.raises(UserError, match=r"few\.jsonl:1: teacher_temperature is [12], and train\.temperature=3"):
        trainer(
            *(word for word in given if not word.startswith("train.temperature")),
            *few[:2],
            "exp_name=hotter",
            "train.temperature=3",
        )
    with pytest.raises(UserError, match=r"is a teacher, and 11 rows of data\.train have what another says"):
        refuse_other_teacher(cached.run.config, cached.loss, [("train", taught.train)])


def test_ids_that_only_a_padded_vocabulary_has_are_not_written() -> None:
    table = np.array([[-1.0, -0.5, -2.0, 3, 99]], np.float32)
    assert teacher_rows._columns(table, 99) == {
        "teacher_ids": [[3]], "teacher_logps": [[-0.5]], "teacher_token_logps": [-1.0]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["loss=gkd", "reference.cache=always"], "reference.cache=always: the rows have what the teacher says"),
        (["loss=gkd", "reference.export=again"], "and the rows have that already: leave it out"),
        (["loss=dpo", "reference.export=rows"], "writes what a teacher says of the rows, and loss=dpo has no teacher"),
        (
            ["loss=gkd", "reference.name_or_path=tiny", "reference.cache=never", "reference.export=x"],
            "not never",
        ),
    ],
)
def test_keys_about_a_teacher_that_contradict_each_other_are_refused(more: list[str], complaint: str) -> None:
    config = composed.config_of(*more, "model=tiny", "data=arithmetic", "exp_name=x")
    batches: Any = None  # is not asked
    with pytest.raises(UserError, match=complaint):
        decision(config, bind_loss(config.loss, []), batches)


@torch.no_grad()
def test_the_first_loss_is_the_divergence_to_transformers_own_teacher(
    teacher: Path, trainer: Callable[..., Trainer], cache: Path
) -> None:
    """With all ids of the tokenizer, at a temperature."""
    whole = len(AutoTokenizer.from_pretrained(teacher))
    made = trainer(*words(teacher, f"loss.top_k={whole}", "train.temperature=2", "train.batch_size=2", "loss.tail=drop"))
    microbatches = made._microbatches(made.train, np.arange(2))
    value = sum(made._loss(each, None, 2).values.sum().item() for each in microbatches)
    models = [AutoModelForCausalLM.from_pretrained(place).eval() for place in (locate("tiny", None, cache), teacher)]
    wanted = 0.0
    for item in (made.train.rows[0], made.train.rows[1]):
        (completion,) = item.completions
        ids = torch.tensor([[*item.prompt.tolist(), *completion.ids.tolist()]])
        at = torch.from_numpy(np.flatnonzero(completion.scored)) + len(item.prompt) - 1
        student, taught = ((model(ids).logits[0, at].double() / 2).log_softmax(-1)[:, :whole] for model in models)
        wanted += (taught.exp() * (taught - student)).sum().item()
    assert value == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(peft: str, teacher: Path, tmp_path: Path, cache: Path) -> None:
    more = ["train.steps=5", "train.eval_at_start=false", "checkpoint.every=2", "checkpoint.keep_last=9", "data.eval=[]"]
    config = compose(cache, tmp_path / "runs", *words(teacher, *more), f"peft={peft}", "optim.lr=1e-3", "loss.beta=0.5")
    assert run(config, []) == 0
    whole = Path(config.run_dir)
    losses = [json.loads(line)["loss"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    halved = stopped(copied(whole, tmp_path / "copy"))
    assert resume(halved) == 0
    before, after = (load_file(directory / "FINAL" / "model.safetensors") for directory in (whole, halved))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_teacher_that_is_missing_or_speaks_otherwise_is_refused_before_a_model_loads(
    teacher: Path, tmp_path: Path, trainer: Callable[..., Trainer]
) -> None:
    message = (
        r"there is none: reference.name_or_path, .* rows with teacher_ids and teacher_logps, which \d+ of \d+ rows of data.train"
    )
    with pytest.raises(UserError, match=message):
        trainer("loss=gkd")
    for word, complaint in (("reference.sync_every=2", "does not move"), ("humanline.low=-1.5", "compares whole distributions")):
        with pytest.raises(UserError, match=complaint):
            trainer(*words(teacher, word))
    parts = {name: {"weight": 1.0} for name in ("sft", "gkd")}
    with pytest.raises(UserError, match=r"loss.parts.gkd: gkd has a teacher, which is no reference of other parts"):
        bind_loss({"_target_": "halos.losses.mixture.mixture", "parts": parts}, [])
    with pytest.raises(UserError, match=r"loss.top_k=9999 is more than the \d+ ids of the policy's vocabulary"):
        trainer(*words(teacher, "loss.top_k=9999"))
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    tokens = json.loads((other / "tokenizer.json").read_text())
    ids = tokens["model"]["vocab"]
    one, two = sorted(ids)[40:42]
    ids[one], ids[two] = ids[two], ids[one]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(UserError, match="has another tokenizer: 2 of the policy's"):
        trainer(*words(other))


def test_what_is_kept_of_a_teacher_is_of_so_many_ids(teacher: Path, trainer: Callable[..., Trainer]) -> None:
    """Two runs in one cache_dir that keep another number of ids do not take each other's."""
    widths = []
    for top_k in (2, 3):
        one = trainer(*words(teacher, f"loss.top_k={top_k}", "reference.cache=always", f"exp_name=top{top_k}"))
        assert one.reference_logps is not None
        widths.append(one.reference_logps.find(one.rows([one.train.rows[0]])[0]).shape[1])
    assert widths == [1 + 2 * 2, 1 + 2 * 3]
