"""The gallery: every job of its sweeps is accepted, no loss is left out, and its table's numbers are those worked by hand."""

import importlib
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

from halos.models import tiny
from tests.composed import config_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gallery(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "launch" / "results"), *sys.path])
    return importlib.import_module("gallery")


def points(arguments: list[str]) -> list[list[str]]:
    """The overrides of each job: those of a sweep separate values by commas; one of brackets or braces has one value."""
    given = [text for text in arguments if text != "-m" and not text.startswith("hydra/")]
    values = [
        text.partition("=")[2].split(",") if text.startswith(("loss=", "seed=")) else [text.partition("=")[2]] for text in given
    ]
    keys = [text.partition("=")[0] for text in given]
    return [[f"{key}={value}" for key, value in zip(keys, one, strict=True)] for one in itertools.product(*values)]


@pytest.mark.parametrize(
    ("model", "losses"),
    [
        ("tiny", ("dpo", "kto", "grpo", "mixture", "gkd", "online")),
        ("smollm2", None),
        pytest.param("tiny", None, marks=pytest.mark.slow),
    ],
)
def test_every_job_of_the_gallery_is_accepted_and_has_its_budget(
    model: str, losses: tuple[str, ...] | None, gallery, tmp_path: Path
) -> None:
    """`losses` are those looked at; None is all."""
    for name in ("start", "teacher"):
        tiny.build(tmp_path / name / "FINAL")
    sweeps = [arguments for done, arguments in gallery.commands(model, tmp_path, None) if done is None]
    jobs = [job for sweep in sweeps for job in points(sweep) if "seed=0" in job]
    jobs = [job for job in jobs if losses is None or any(f"loss={loss}" in job for loss in losses)]
    configs = [config_of(*job) for job in jobs]
    assert {(one.train.steps, one.train.batch_size) for one in configs} == {(24, 16) if model == "tiny" else (12, 8)}
    assert {one.optim["lr"] for one in configs} == {5e-5}, "not that of random weights"
    assert {one.model.name_or_path for one in configs} == {f"{tmp_path}/start/FINAL"}
    assert {one.peft.name for one in configs} == {"none" if model == "tiny" else "lora"}
    assert all(one.train.eval_every is None and one.checkpoint["every"] is None for one in configs)


def test_every_loss_is_in_the_gallery_or_could_not_learn_from_its_data(gallery, tmp_path: Path) -> None:
    shown = set()
    for _, arguments in gallery.commands("tiny", tmp_path, None):
        shown |= {text.removeprefix("loss=") for job in points(arguments) for text in job if text.startswith("loss=")}
    assert {file.stem for file in (ROOT / "config" / "loss").glob("*.yaml")} - shown <= {"online", "reward", "prm", "max_rl"}


def test_the_table_has_the_means_and_intervals_worked_by_hand(gallery) -> None:
    """0.5, 0.6, 0.7: mean 0.6, standard deviation 0.1, half-width 4.303 * 0.1 / sqrt(3) = 0.24844."""
    module = sys.modules["gallery_table"]
    zero = dict.fromkeys(module.METRICS, 0.0)
    rows = [module.Measured("dpo", seed, zero | {"exact match": 0.5 + 0.1 * seed}) for seed in range(3)]
    rows.append(module.Measured("alone", 0, zero | {"exact match": 0.25}))
    text = module.page(rows, zero | {"exact match": 0.4}, ["losses/ipo: failed"], pairs=4, problems=2)
    lines = {line.split(" | ")[0].lstrip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert lines["dpo"].endswith("| 3 | 0.000 ± 0.000 | 0.000 ± 0.000 | 0.000 ± 0.000 | 0.000 ± 0.000 | 0.600 ± 0.248 |")
    assert lines["alone"].endswith("| 1 | 0.000 | 0.000 | 0.000 | 0.000 | 0.250 |")
    assert lines["(the start)"].endswith("| 0.400 |")
    assert "- losses/ipo: failed" in text
    mean, half = module.over_seeds([1.0, 3.0])  # sd sqrt(2), so the half-width is the quantile itself
    assert (mean, half) == pytest.approx((2, 12.706))
    assert math.isnan(module.over_seeds([1.0])[1])


def test_a_tie_counts_half(gallery) -> None:
    assert gallery.share_above(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 4.0, 1.0])) == 0.375


def test_the_log_probs_of_pairs_are_those_of_each_sequence_alone(
    gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.build(tmp_path / "tiny")
    rows = list(itertools.islice(gallery.arithmetic.rows("eval"), 2))
    together = gallery.pair_logps(tmp_path / "tiny", rows)
    monkeypatch.setattr(gallery, "BATCH", 1)
    torch.testing.assert_close(together, gallery.pair_logps(tmp_path / "tiny", rows), rtol=0, atol=1e-4)
    tokenizer = gallery.AutoTokenizer.from_pretrained(tmp_path / "tiny")
    ids, start = gallery.encoded(tokenizer, rows[0]["prompt"], rows[0]["chosen"])
    assert tokenizer.decode(ids[start:]) == rows[0]["chosen"][0]["content"] + "<|end|>", "what is scored is the completion"
    model = gallery.AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    alone = sum(float(logps[place - 1, ids[place]]) for place in range(start, len(ids)))
    assert float(together[0, 0]) == pytest.approx(alone, abs=1e-3)


def test_two_runs_of_one_loss_and_seed_are_refused_whatever_their_directories(gallery) -> None:
    rows = [gallery.Measured("bco", seed, {}) for seed in (0, 1, 0)]
    gallery.refuse_twice(rows[:2], Path("runs"))
    with pytest.raises(gallery.UserError, match=r"below runs, .*bco, seed 0"):
        gallery.refuse_twice(rows, Path("runs"))


def test_a_start_of_another_budget_is_refused_and_what_never_began_is_named(gallery, tmp_path: Path) -> None:
    (tmp_path / "start" / "attempts").mkdir(parents=True)
    record = tmp_path / "start" / "attempts" / "000.yaml"
    record.write_text("overrides: [loss=sft, train.steps=100]\n")
    gallery.refuse_other_budget(tmp_path / "start", ["loss=sft", "train.steps=100"])
    with pytest.raises(
        gallery.UserError, match=r"was trained by `loss=sft train.steps=100`, and not by `loss=sft train.steps=8`"
    ):
        gallery.refuse_other_budget(tmp_path / "start", ["loss=sft", "train.steps=8"])
    gallery.refuse_other_budget(tmp_path / "new", ["loss=sft"])
    assert {*gallery.jobs("smollm2")} == {
        (name, seed) for name in ("dpo", "simpo", "orpo", "kto", "bco", "humanline dpo") for seed in range(3)
    }


def test_the_table_waits_for_online_runs_too(gallery) -> None:
    assert ("humanline online dpo", 0) in gallery.jobs("tiny")
