"""Reports on saved runs: tables, figures, and messages."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from halos.errors import UserError
from halos.report.__main__ import main
from halos.report.plots import OPTIMIZER, REWARDS, SECONDS, Panel, draw, learning_curves, passes, smooth
from halos.report.read import Record, read_runs, series
from halos.report.table import table

Row = Mapping[str, Any]
PNG = b"\x89PNG\r\n\x1a\n"


def train_row(step: int, **metrics: float | None) -> Row:
    fixed = {"lr": 1e-5, "grad_norm": 1.5, "examples": 8 * step, "tokens": 100 * step, "tokens_per_second": 50.0}
    return {"step": step, "split": "train", **metrics, **fixed, "peak_memory_mb": 900.0, "seconds": 2.0}


def eval_row(step: int, **metrics: float | None) -> Row:
    return {"step": step, "split": "eval", **metrics, "examples": 16, "seconds": 0.5}


def dpo_rows(steps: int = 40) -> list[Row]:
    def metrics(step: int) -> dict[str, float]:
        done = step / steps
        return {"loss": 0.7 - 0.3 * done, "rewards/accuracies": 0.5 + 0.4 * done, "rewards/margins": 2 * done}

    rows = [train_row(step, **metrics(step)) for step in range(1, steps + 1)]
    return [eval_row(0, **metrics(0)), *rows, eval_row(steps, **metrics(steps))]


def save(
    path: Path, rows: Sequence[Row] | str, *, loss: str = "dpo", status: str | None = "finished", config: Row | None = None
) -> Path:
    """Write the small files of a run."""
    (path / "attempts").mkdir(parents=True)
    settings = {
        "loss": {"_target_": f"halos.losses.{loss}.{loss}"},
        "model": {"name_or_path": "org/model-1B"},
        "peft": {"name": "lora", "r": 16},
        "train": {"steps": None},
        "objective": {"metric": "rewards/accuracies", "mode": "max"},
    }
    (path / "config.yaml").write_text(yaml.safe_dump({**settings, **(config or {})}))
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    (path / "metrics.jsonl").write_text(text)
    if status:
        last = 0 if isinstance(rows, str) else max((row["step"] for row in rows), default=0)
        (path / "result.json").write_text(json.dumps({"status": status, "step": last, "metrics": {}}))
    return path


def report(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def drawn(records: Sequence[Record], panels: Sequence[Panel]) -> Figure:
    figure = draw(records, panels)
    assert figure is not None
    return figure


def cells(text: str) -> list[dict[str, str]]:
    """Parse a Markdown table into one dict per row."""
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if "|" in line]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_the_table_has_the_settings_and_the_change_of_each_metric(tmp_path: Path):
    records, _ = read_runs([save(tmp_path / "a", dpo_rows())])
    assert cells(table(records)) == [
        {
            "run": "a",
            "loss": "dpo",
            "model": "org/model-1B",
            "peft": "lora r=16",
            "steps": "40",
            "status": "finished",
            "held-out loss": "0.7 → 0.4",
            "held-out rewards/accuracies": "0.5 → 0.9",
            "held-out rewards/margins": "0 → 2",
            "time": "1 min 21 s",
        }
    ]


def test_runs_with_different_metrics_leave_each_others_cells_empty(tmp_path: Path):
    sft = [eval_row(0, loss=2.0, perplexity=7.4), train_row(1, loss=1.9), eval_row(1, loss=1.5, perplexity=4.5)]
    places = [save(tmp_path / "a", dpo_rows()), save(tmp_path / "b", sft, loss="sft")]
    first, second = cells(table(read_runs(places)[0]))
    assert (first["held-out perplexity"], second["held-out perplexity"]) == ("", "7.4 → 4.5")
    assert second["held-out rewards/margins"] == ""


def test_an_unusual_objective_gets_a_column(tmp_path: Path):
    rows = [eval_row(0, loss=1.0, **{"logps/chosen": -9.0}), eval_row(5, loss=0.5, **{"logps/chosen": -4.0})]
    config = {"objective": {"metric": "logps/chosen", "mode": "max"}}
    (row,) = cells(table(read_runs([save(tmp_path / "a", rows, config=config)])[0]))
    assert row["held-out logps/chosen"] == "-9 → -4"


def test_the_time_of_rounds_is_that_of_all_they_did_and_each_part_is_drawn(tmp_path: Path):
    parts = {"seconds/sample": 40.0, "seconds/score": 5.0, "seconds/train": 100.0, "seconds/start": 15.0}
    rows = [{"step": 0, "split": "train", "reward": 1.0, **parts}, eval_row(1, reward=1.0, **{"seconds/sample": 20.0})]
    records, _ = read_runs([save(tmp_path / "a", rows, config={"online": {"loss": "dpo", "steps": None}})])
    (row,) = cells(table(records))
    assert row["time"] == "3 min 00 s"
    titles = [axis.get_title(loc="left") for axis in drawn(records, SECONDS).axes]
    assert titles[:4] == [f"Seconds of {what}" for what in ("sampling", "scoring", "training", "starting processes")]
    rows = [{**train_row(1, loss=1.0), "seconds/sample": 1.5, "seconds/score": 0.1, "seconds/train": 0.4}]
    records, _ = read_runs([save(tmp_path / "live", rows, config={"online": {"loss": "dpo", "steps": 1}})])
    assert cells(table(records))[0]["time"] == "2.0 s", "the parts are of the whole"


def test_intervals_are_in_the_table_and_drawn(tmp_path: Path):
    def held_out(step: int, reward: float) -> Row:
        more = {"reward/ci_low": reward - 0.125, "reward/ci_high": reward + 0.125, "pass@4": 0.5, "pass@4/ci_low": 0.25,
                "pass@4/ci_high": 0.75}  # fmt: skip
        return eval_row(step, reward=reward, **more)

    records, _ = read_runs([save(tmp_path / "a", [held_out(0, 0.25), held_out(5, 0.5)]), save(tmp_path / "b", dpo_rows())])
    row, other = cells(table(records))
    assert row["held-out reward"] == "0.25 → 0.5 (0.375 to 0.625)"
    assert (row["held-out pass@4"], other["held-out pass@4"]) == ("0.5 → 0.5 (0.25 to 0.75)", "")
    figure = drawn(records, [*REWARDS, *passes(records)])
    axes = {axis.get_title(loc="left"): axis for axis in figure.axes}
    (band,) = [each for each in axes["Reward"].collections if isinstance(each, PolyCollection)]
    corners = {(float(x), float(y)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(0, 0.125), (0, 0.375), (5, 0.375), (5, 0.625)}
    assert axes["Reward"].get_ylim()[0] < 0.125
    assert axes["Reward"].get_ylim()[1] > 0.625, "within the panel"
    assert len(axes["pass@4, held out"].get_lines()) > 0


def test_a_first_evaluation_after_the_start_has_its_step(tmp_path: Path):
    rows = [train_row(5, loss=0.6), eval_row(5, loss=0.6), eval_row(10, loss=0.5)]
    (row,) = cells(table(read_runs([save(tmp_path / "a", rows)])[0]))
    assert row["held-out loss"] == "0.6 (step 5) → 0.5"


@pytest.mark.parametrize(
    ("status", "said"), [("running", "running"), ("stopped", "stopped"), ("failed", "failed"), (None, "unknown (no result.json)")]
)
def test_an_unfinished_run_is_reported_so_far(tmp_path: Path, status: str | None, said: str):
    place = save(tmp_path / "a", dpo_rows(20), status=status, config={"train": {"steps": 50}})
    (row,) = cells(table(read_runs([place])[0]))
    assert (row["status"], row["steps"]) == (said, "20 of 50")


def test_a_run_that_was_continued_is_reported_with_what_it_has_now(tmp_path: Path):
    place = save(tmp_path / "a", dpo_rows(20), status="stopped", config={"train": {"steps": 4}})
    for number, change in enumerate(({"train.steps": [4, 50]}, {"train.steps": [50, 60], "renamed.since": [1, 2]})):
        (place / "attempts" / f"{number:03d}.yaml").write_text(yaml.safe_dump({"changed": change}))
    (record,) = read_runs([place])[0]
    assert cells(table([record]))[0]["steps"] == "20 of 60"


def test_an_incomplete_last_line_is_skipped(tmp_path: Path):
    text = "".join(json.dumps(row) + "\n" for row in dpo_rows()) + '{"step": 41, "spl'
    (record,), _ = read_runs([save(tmp_path / "a", text)])
    assert len(record.train) == 40


def test_a_local_model_is_named_by_its_last_part_and_a_hub_model_by_both(tmp_path: Path):
    names = {"/data/models/mine/": "mine", "./mine": "mine", "runs/a/FINAL": "a/FINAL", "org/name": "org/name", "tiny": "tiny"}
    places = [save(tmp_path / str(i), dpo_rows(), config={"model": {"name_or_path": name}}) for i, name in enumerate(names)]
    assert [row["model"] for row in cells(table(read_runs(places)[0]))] == list(names.values())


def test_losses_that_share_a_function_keep_their_names(tmp_path: Path):
    def named(name: str, overrides: Sequence[str] | None = None, loss: str = "grpo", **config: Any) -> str:
        place = save(tmp_path / name, dpo_rows(), loss=loss, config=config)
        if overrides is not None:
            (place / "attempts" / "000.yaml").write_text(yaml.safe_dump({"overrides": overrides}))
        return read_runs([place])[0][0].loss

    assert named("recorded", ["loss=ppo"], loss_choice="dapo") == "dapo"
    assert named("own function", ["loss=grpo"], loss="ipo", loss_choice=None) == "ipo"
    assert named("older", ["experiment=x", "loss=gspo", "seed=0"]) == "gspo"
    assert named("older, own function", ["loss=dpo", "loss._target_=mine.hinge.hinge"], loss="hinge") == "hinge"
    assert named("older, copied without its records") == "grpo"
    assert named("live", loss_choice="max_rl", online={"loss": "max_rl", "steps": 5}) == "online max_rl"
    assert named("older live", ["loss=online"], online={"loss": "opo", "steps": 5, "overrides": []}) == "online opo"
    assert named("rounds", loss_choice="online", online={"loss": "sapo", "steps": None}) == "online sapo"
    clamped = {"low": -1.5, "high": None}
    assert named("clamped", loss_choice="dpo", humanline=clamped) == "humanline dpo"
    assert named("moves alone", loss_choice="dpo", humanline={"low": None, "high": None}) == "dpo"
    assert named("clamped live", humanline=clamped, online={"loss": "dpo", "steps": 5}) == "humanline online dpo"
    assert {row["loss"] for row in cells(table(read_runs([tmp_path / "recorded", tmp_path / "older"])[0]))} == {"dapo", "gspo"}


def test_a_sweep_lists_its_jobs_by_overrides_in_numeric_order(tmp_path: Path):
    for lr in ("1e-4", "1e-5", "3e-5"):
        save(tmp_path / "sweep" / f"optim.lr={lr}-0a1b2c3d", dpo_rows())
    save(tmp_path / "sweep" / ".optim.lr=1e-3-0a1b2c3d.deleted-7", dpo_rows())
    records, passed = read_runs([tmp_path / "sweep"])
    assert [record.label for record in records] == ["optim.lr=1e-5", "optim.lr=3e-5", "optim.lr=1e-4"]
    assert passed == []


def test_runs_of_one_name_are_distinguished_by_their_directories(tmp_path: Path):
    places = [save(tmp_path / day / "demo", dpo_rows()) for day in ("monday", "tuesday")]
    assert [record.label for record in read_runs(places)[0]] == ["monday/demo", "tuesday/demo"]


def test_a_run_named_twice_is_reported_once(tmp_path: Path):
    place = save(tmp_path / "sweep" / "a", dpo_rows())
    assert len(read_runs([place, tmp_path / "sweep", place])[0]) == 1


def test_the_small_files_alone_are_enough(tmp_path: Path):
    place = save(tmp_path / "a", dpo_rows(), status=None)
    (place / "attempts").rmdir()
    assert len(read_runs([place])[0]) == 1


def test_a_job_without_metrics_is_skipped_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save(tmp_path / "sweep" / "a", dpo_rows())
    save(tmp_path / "sweep" / "b", [], status="running")
    assert report(tmp_path / "sweep", "--output", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert f"skipped: {tmp_path / 'sweep' / 'b'} has logged nothing yet" in said.err
    assert len(cells(said.out.split("\n\n")[0])) == 1


def test_a_requested_run_without_metrics_is_not_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    places = [save(tmp_path / "a", dpo_rows()), save(tmp_path / "b", [])]
    assert report(*places, "--output", tmp_path / "out") == 2
    assert f"{tmp_path / 'b'} has logged nothing yet" in capsys.readouterr().err


def nothing_there(place: Path) -> Path:
    return place / "runs" / "typo"


def no_run(place: Path) -> Path:
    (place / "stuff").mkdir()
    return place / "stuff"


def empty_run(place: Path) -> Path:
    return save(place / "a", [], status="running")


def only_configured(place: Path) -> Path:
    (save(place / "a", [], status=None) / "metrics.jsonl").unlink()
    return place / "a"


def sweep_of_empty_runs(place: Path) -> Path:
    save(place / "sweep" / "a", [])
    return place / "sweep"


def broken_metrics(place: Path) -> Path:
    return save(place / "a", '{"step": 1, "split": "train"\n{"step": 2}\n')


def broken_config(place: Path) -> Path:
    (save(place / "a", dpo_rows()) / "config.yaml").write_text("loss: [unclosed\n")
    return place / "a"


def empty_config(place: Path) -> Path:
    (save(place / "a", dpo_rows()) / "config.yaml").write_text("")
    return place / "a"


def broken_result(place: Path) -> Path:
    (save(place / "a", dpo_rows()) / "result.json").write_text("{")
    return place / "a"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (nothing_there, "there is no such directory"),
        (no_run, "neither a run nor a directory of runs"),
        (empty_run, "has logged nothing yet (metrics.jsonl is empty, status running)"),
        (only_configured, "has logged nothing yet"),
        (sweep_of_empty_runs, "nothing to report"),
        (broken_metrics, "cannot be read, 1 lines are damaged"),
        (broken_config, "config.yaml cannot be read"),
        (empty_config, "holds no configuration"),
        (broken_result, "result.json cannot be read"),
    ],
)
def test_a_run_that_cannot_be_reported_is_one_message_and_status_2(
    make: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert report(make(tmp_path), "--output", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_written_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert report(save(tmp_path / "a", dpo_rows()), "--output", tmp_path / "file") == 2
    assert "--output" in capsys.readouterr().err


def test_figures_are_written_and_their_paths_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    places = [save(tmp_path / name, dpo_rows()) for name in ("a", "b")]
    assert report(*places, "--output", tmp_path / "out", "--markdown", tmp_path / "new" / "table.md") == 0
    printed = capsys.readouterr().out
    pictures = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert pictures == ["learning_curves.png", "optimizer.png", "rewards.png"]
    for name in pictures:
        picture = (tmp_path / "out" / name).read_bytes()
        assert picture.startswith(PNG)
        assert len(picture) > 10_000
        assert str(tmp_path / "out" / name) in printed
    markdown = (tmp_path / "new" / "table.md").read_text()
    assert markdown.startswith("| run | loss |")
    assert markdown in printed


def test_figures_are_written_next_to_the_runs_by_default(tmp_path: Path):
    one, other = (save(tmp_path / "runs" / name, dpo_rows()) for name in ("a", "b"))
    assert [report(one), report(one, other)] == [0, 0]
    assert (one / "report" / "rewards.png").exists()
    assert (tmp_path / "runs" / "report" / "rewards.png").exists()


def test_a_run_without_rewards_has_no_figure_of_them(tmp_path: Path):
    rows = [eval_row(0, loss=2.0), train_row(1, loss=1.9), eval_row(1, loss=1.5)]
    assert report(save(tmp_path / "a", rows, loss="sft"), "--output", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["learning_curves.png", "optimizer.png"]


def test_the_figures_show_the_logged_numbers_and_each_run_keeps_its_colour(tmp_path: Path):
    sft = [eval_row(0, loss=2.0), train_row(1, loss=1.9), eval_row(1, loss=1.5)]
    places = [save(tmp_path / "a", dpo_rows()), save(tmp_path / "b", sft, loss="sft"), save(tmp_path / "c", dpo_rows(30))]
    records, _ = read_runs(places)
    colors = {}
    for panels in ([Panel(("loss",), "loss")], REWARDS, OPTIMIZER):
        figure = drawn(records, panels)
        for line in figure.axes[0].get_lines():
            if line.get_linestyle() != ":":  # a level to compare with
                colors.setdefault({40: "a", 1: "b", 30: "c"}[np.asarray(line.get_xdata())[-1]], set()).add(line.get_color())
    assert [len(colors[run]) for run in "abc"] == [1, 1, 1]
    assert len(colors["a"] | colors["b"] | colors["c"]) == 3
    dashed = [line for line in drawn(records, [Panel(("loss",), "loss")]).axes[0].get_lines() if line.get_linestyle() == "--"]
    assert [np.asarray(line.get_ydata()) for line in dashed] == [
        pytest.approx([0.7, 0.4]),
        pytest.approx([2.0, 1.5]),
        pytest.approx([0.7, 0.4]),
    ]


def test_losses_of_different_kinds_share_no_axis(tmp_path: Path):
    sft = [eval_row(0, loss=2.0), train_row(1, loss=1.9), eval_row(1, loss=1.5)]
    places = [save(tmp_path / "a", dpo_rows()), save(tmp_path / "b", sft, loss="sft")]
    records, _ = read_runs(places)
    panels = learning_curves(records)
    assert [panel.title for panel in panels] == ["dpo loss", "sft loss"]
    assert [[record.label for record, _ in panel.of(records)] for panel in panels] == [["a"], ["b"]]
    assert len(drawn(records, panels).axes) == 2


def test_numbers_that_are_not_finite_leave_a_gap_and_no_failure(tmp_path: Path):
    rows = [train_row(step, loss=None if step % 7 == 0 else 1.0 / step) for step in range(1, 41)]
    rows = [eval_row(0, loss=1.0), *rows, eval_row(40, loss=None)]
    place = save(tmp_path / "a", rows)
    assert report(place, "--output", tmp_path / "out") == 0
    (record,), _ = read_runs([place])
    steps, values = series(record.train, "loss")
    assert steps[np.isnan(values)].tolist() == [7, 14, 21, 28, 35]
    assert cells(table([record]))[0]["held-out loss"] == "1 → not finite"


def test_a_metric_that_some_rows_lack_is_drawn_where_it_is(tmp_path: Path):
    """KTO omits the metrics of a class that a batch does not have."""
    rows = [train_row(step, loss=0.5, **({"rewards/margins": 0.1} if step % 2 else {})) for step in range(1, 10)]
    place = save(tmp_path / "a", rows, loss="kto")
    (record,), _ = read_runs([place])
    assert series(record.train, "rewards/margins")[0].tolist() == [1, 3, 5, 7, 9]
    assert report(place, "--output", tmp_path / "out") == 0


def test_unusual_names_are_escaped(tmp_path: Path):
    labels = ["_hidden", "cost$1$", "a|b", "naïve-ε"]
    places = [save(tmp_path / label, dpo_rows()) for label in labels]
    assert report(*places, "--output", tmp_path, "--markdown", tmp_path / "table.md") == 0
    lines = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert [line.split(" | dpo")[0] for line in lines] == ["| _hidden", "| cost$1$", "| a\\|b", "| naïve-ε"]
    names = [text.get_text().strip() for text in drawn(read_runs(places)[0], OPTIMIZER).legends[0].get_texts()]
    assert names == ["_hidden", r"cost\$1\$", "a|b", "naïve-ε"]


def test_smoothing_keeps_a_constant_and_does_not_lag():
    line = np.linspace(3.0, 1.0, 200)
    assert smooth(np.full(50, 2.5)) == pytest.approx(2.5)
    assert smooth(line)[30:-30] == pytest.approx(line[30:-30])
    noisy = line + np.random.default_rng(0).normal(0, 0.3, 200)
    assert np.std(smooth(noisy) - line) < 0.3 * np.std(noisy - line)


def test_smoothing_bridges_a_gap():
    values = np.full(60, 4.0)
    values[[0, 10, 11, 59]] = math.nan
    assert smooth(values) == pytest.approx(4.0)


def test_a_sweep_of_many_runs_is_drawn(tmp_path: Path):
    for i in range(13):
        save(tmp_path / "sweep" / f"seed={i}", dpo_rows(25))
    records, _ = read_runs([tmp_path / "sweep"])
    figure = drawn(records, REWARDS)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"seed={i}" for i in range(13)]
    many = [replace(records[0], label=f"loss=reinforce_plus_plus,seed={i}") for i in range(150)]
    heights = []
    for runs in (records, many):
        figure = drawn(runs, REWARDS)
        figure.draw_without_rendering()
        heights.append(figure.axes[0].get_position().height * figure.get_figheight())
    assert heights[1] > 0.8 * heights[0], "a long legend takes no room from the panels"


def test_nothing_to_draw_is_no_figure(tmp_path: Path):
    records, _ = read_runs([save(tmp_path / "a", [eval_row(0, loss=1.0)])])
    assert draw(records, OPTIMIZER) is None


def test_the_command_imports_no_torch(tmp_path: Path):
    place = save(tmp_path / "a", dpo_rows())
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_module('halos.report', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(place), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert "learning_curves.png" in done.stdout


def test_errors_are_user_errors(tmp_path: Path):
    with pytest.raises(UserError, match="no such directory"):
        read_runs([tmp_path / "nowhere"])


def test_one_step_has_integer_ticks_and_no_legend_of_evaluations_without_any(tmp_path: Path):
    save(tmp_path / "one", [train_row(3, **{"rewards/accuracies": 0.5, "loss": 0.7})])
    figure = drawn(read_runs([tmp_path / "one"])[0], REWARDS)
    [low, high] = figure.axes[0].get_xlim()
    assert [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high] == [2, 3, 4]
    assert figure.legends == []
    save(tmp_path / "both", [train_row(3, **{"rewards/accuracies": 0.5}), eval_row(3, **{"rewards/accuracies": 0.6})])
    assert len(drawn(read_runs([tmp_path / "both"])[0], REWARDS).legends) == 1
