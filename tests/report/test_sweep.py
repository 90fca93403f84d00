"""A sweep's table and figures, from the files of its runs."""

import csv
import json

import pytest
import yaml

from halos.errors import UserError
from halos.report.sweep import compare, is_sweep, swept


def run(place, name, typed, values, *, metric="rewards/accuracies", mode="max", status="finished"):
    path = place / name
    (path / "attempts").mkdir(parents=True)
    config = {"loss": {"_target_": "halos.losses.dpo.dpo"}, "objective": {"metric": metric, "mode": mode}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    shared = ["model=tiny", "exp_name=s", f"run_dir={path}"]
    (path / "attempts" / "000.yaml").write_text(yaml.safe_dump({"overrides": [*shared, *typed]}))
    rows = [{"step": 1, "split": "train", "loss": 1.0, "seconds": 2.0}]
    rows += [{"step": n, "split": "eval", "loss": 1.0, metric: value, "seconds": 1.0} for n, value in enumerate(values)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "result.json").write_text(json.dumps({"status": status, "step": 1, "metrics": {}}))


@pytest.fixture
def sweep(tmp_path):
    run(tmp_path, "a-00000001", ["loss=dpo", "++optim.lr=0.001"], [0.5, 0.6])
    run(tmp_path, "b-00000002", ["loss=dpo", "++optim.lr=0.1"], [0.5, 0.9])
    run(tmp_path, "c-00000003", ["loss=ipo", "++optim.lr=0.001"], [0.5, 0.7])
    run(tmp_path, "d-00000004", ["loss=ipo", "++optim.lr=0.1"], [0.95], status="failed")
    (tmp_path / "multirun.yaml").write_text("")
    return tmp_path


def test_swept_keys_are_the_overrides_that_differ_between_runs():
    assert swept([{"a": "1", "b": "2", "run_dir": "x"}, {"a": "1", "b": "3", "run_dir": "y"}]) == ["b"]
    assert swept([{"a": "1"}, {}]) == ["a"]
    assert swept([{"a": "1"}]) == []


def test_the_table_has_the_best_run_first_and_runs_without_a_value_last(sweep):
    text, written = compare(sweep)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    assert rows[0] == ["loss", "optim.lr", "rewards/accuracies (max)", "status", "step"]
    assert [row[:4] for row in rows[2:]] == [
        ["dpo", "0.1", "0.9", "finished"],
        ["ipo", "0.001", "0.7", "finished"],
        ["dpo", "0.001", "0.6", "finished"],
        ["ipo", "0.1", "", "failed"],
    ]
    assert (sweep / "sweep.md").read_text().startswith(f"# {sweep.name}\n\n{text}")
    with (sweep / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["run"] for row in table] == ["b-00000002", "c-00000003", "a-00000001", "d-00000004"]
    assert table[0] == {
        "run": "b-00000002", "status": "finished", "step": "1", "loss": "dpo", "optim.lr": "0.1", "eval/loss": "1.0",
        "eval/rewards/accuracies": "0.9", "seconds": "4.0",
    }  # fmt: skip
    pictures = [path.name for path in written if path.suffix == ".png"]
    assert {"objective.png", "learning_curves.png"} <= set(pictures)
    assert all(path.stat().st_size > 0 for path in written)


def test_a_minimised_objective_has_the_smallest_first(tmp_path):
    for name, value in (("a-1", 3.0), ("b-2", 1.0), ("c-3", 2.0)):
        run(tmp_path, name, [f"seed={name}"], [value], metric="loss", mode="min")
    values = [line.split("|")[2].strip() for line in compare(tmp_path)[0].strip().splitlines()[2:]]
    assert values == ["1", "2", "3"]


def test_of_several_objectives_the_one_that_most_runs_measure_is_shown_and_different_scales_are_not_ranked(tmp_path):
    run(tmp_path, "a-1", ["loss=dpo"], [0.5], metric="rewards/accuracies")
    run(tmp_path, "b-2", ["loss=kto"], [0.1], metric="rewards/margins")
    row = {"step": 9, "split": "eval", "rewards/margins": 0.3, "rewards/accuracies": 0.5}
    with (tmp_path / "a-1" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    text, written = compare(tmp_path)
    assert "objective.png" not in [path.name for path in written], "the two have no common axis"
    assert "rewards/margins (not ranked)" in text
    assert "Not ranked: the scale of rewards/margins differs between losses" in text


def test_margins_whose_scale_depends_on_a_hyperparameter_are_replaced_by_a_metric_of_all_runs(tmp_path):
    for name, beta, margin, accuracy in (("a-1", "0.1", 0.2, 0.9), ("b-2", "1.0", 1.5, 0.6)):
        run(tmp_path, name, ["loss=dpo", f"loss.beta={beta}"], [margin], metric="rewards/margins")
        with (tmp_path / name / "metrics.jsonl").open("a") as file:
            row = {"step": 9, "split": "eval", "rewards/margins": margin, "rewards/accuracies": accuracy}
            file.write(json.dumps(row) + "\n")
    text = compare(tmp_path)[0]
    assert "rewards/accuracies (max)" in text
    assert text.index("0.9") < text.index("0.6")
    assert "scale of rewards/margins depends on loss.beta" in text


def test_rewards_of_several_scorers_are_not_ranked(tmp_path):
    for name, function, reward in (("a-1", "length", 9.0), ("b-2", "exact", 0.5)):
        words = ["loss=online", "online.steps=2", "++train.seed=1", f"online.scorer.functions=[{function}]"]
        run(tmp_path, name, words, [reward], metric="reward")
    text = compare(tmp_path)[0]
    assert "reward (not ranked)" in text
    assert "Not ranked: the scale of reward depends on online.scorer.functions, and the runs have no other metric" in text


def test_rewards_are_ranked_where_the_key_of_the_scorer_changes_no_scale(tmp_path):
    for name, size, reward in (("a-1", 8, 0.25), ("b-2", 16, 0.5)):
        run(tmp_path, name, ["loss=online", "online.steps=2", f"online.scorer.batch_size={size}"], [reward], metric="reward")
    text = compare(tmp_path)[0]
    assert "reward (max)" in text
    assert text.index("0.5") < text.index("0.25")


def test_a_directory_without_runs_is_one_message(tmp_path):
    assert not is_sweep(tmp_path)
    with pytest.raises(UserError, match="neither a run nor a directory of runs"):
        compare(tmp_path)
