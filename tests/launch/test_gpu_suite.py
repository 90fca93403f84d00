"""The GPU suite: its schedule and table, its configurations, and its yardsticks, on the CPU."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from halos.errors import UserError
from tests import composed

if TYPE_CHECKING:
    from halos.trainers.base import Trainer

ROOT = Path(__file__).resolve().parents[2]
CARD = {"memory_gib": 24.0, "free_gib": 23.0, "bfloat16": True}


@pytest.fixture(scope="module", autouse=True)
def _modules() -> Iterator[None]:
    """The suite's modules and those of the comparisons, as its processes find them."""
    paths = [str(ROOT / "launch"), str(ROOT / "launch" / "compare")]
    sys.path[:0] = paths
    yield
    for path in paths:
        sys.path.remove(path)


# --- schedule and table ------------------------------------------------------------------------------------------------


def schedule(
    tmp_path: Path, commands: dict[str, str], seconds: float = 60.0, device: str = "cpu", **fields: Any
) -> dict[str, Any]:
    """The rows of checks that run these shell commands, in which $OUTPUT is the file of the result, by name. `fields`: of the
    check of each name."""
    from gpu.place import Place
    from gpu.plan import Check
    from gpu.suite import Suite

    checks = [Check(name, "", **{"seconds": 30, "expected": "all", **fields.get(name, {})}) for name in commands]

    def command(name: str, output: Path) -> list[str]:
        return ["sh", "-c", f"OUTPUT={output}; cd {tmp_path}; {commands[name]}"]

    place = Place(str(tmp_path / "work"), device, quick=True, card=CARD)
    rows = Suite(checks, place, seconds=seconds, lanes=3, command=command).run()
    assert [row["name"] for row in rows] == list(commands)
    return {row["name"]: row for row in rows}


def writes(status: str, before: str = ":") -> str:
    result = json.dumps({"status": status, "figure": "3 of 3", "data": {"three": 3}})
    return f"{before}; echo '{result}' > $OUTPUT"


def test_a_check_that_hangs_is_killed_with_what_it_started_and_the_others_run_on(tmp_path: Path) -> None:
    hangs = "setsid sleep 1000 & echo $! > below; wait"
    rows = schedule(tmp_path, {"good": writes("passed"), "hangs": hangs, "dies": "echo so said it; exit 3"}, hangs={"seconds": 1})
    assert rows["good"]["status"] == "passed"
    assert rows["good"]["data"] == {"three": 3}
    assert rows["hangs"]["status"] == "failed"
    assert rows["hangs"]["figure"] == "killed after 1 s"
    assert rows["dies"]["figure"] == "status 3: so said it"
    stat = Path("/proc") / (tmp_path / "below").read_text().strip() / "stat"
    assert not stat.is_file() or stat.read_text().split()[2] == "Z"


def test_a_check_waits_for_what_it_needs_and_for_the_card_where_it_must_be_alone(tmp_path: Path) -> None:
    commands = {
        "later": writes("passed", "test -f made"), "made": writes("passed", "sleep 0.3; touch made busy; sleep 0.3; rm busy"),
        "alone": writes("passed", "test ! -f busy && touch busy && sleep 0.3 && rm busy"),
        "after": writes("passed", "test ! -f busy"),
    }  # fmt: skip
    commands = {name: command.replace("; echo", " && echo") for name, command in commands.items()}
    rows = schedule(tmp_path, commands, later={"needs": ("made",)}, alone={"alone": True})
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(commands, "passed")


def test_checks_that_cannot_run_say_why(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "large": {"memory": 44},
        "after_large": {"needs": ("large",)},
        "after_broken": {"needs": ("broken",)},
    }
    commands = {"broken": "false", **dict.fromkeys(fields, writes("passed"))}
    rows = schedule(tmp_path, commands, device="cuda", **fields)
    assert [rows[name]["status"] for name in commands] == ["failed", "skipped", "skipped", "failed"]
    assert rows["large"]["figure"] == "needs 44 GiB, the card has 24"
    assert rows["after_broken"]["figure"] == "needs broken: failed"
    late = schedule(tmp_path, {"late": writes("passed")}, seconds=5)
    assert late["late"]["status"] == "failed"
    assert "5 s are over" in late["late"]["figure"]


def test_what_a_killed_run_has_said_is_kept(tmp_path: Path) -> None:
    from gpu.place import Place

    place = Place(str(tmp_path / "work"), "cpu", quick=True)
    assert place.command("hangs", ["echo", "before"]).stdout == "before\n"
    done = place.command("hangs", ["sh", "-c", "echo on; echo off >&2; exit 3"])
    assert (done.returncode, done.stdout) == (3, "on\noff\n")
    assert "exit status 0\n$ sh -c" in place.log("hangs").read_text()
    rows = schedule(tmp_path, {"hangs": "exec sleep 1000"}, hangs={"seconds": 1})
    assert rows["hangs"]["data"]["said"][-3:] == ["on", "off", "exit status 3"]


def test_the_table_says_what_passed_and_only_that_all_did(tmp_path: Path) -> None:
    from gpu import table

    good = {"name": "a", "status": "passed", "figure": "3 | 4", "expected": "3", "seconds": 1.0, "data": {}}
    rows = [good, {**good, "name": "b"}, {**good, "name": "c", "status": "skipped"}]
    assert table.passed(rows)
    assert not table.passed([*rows, {**good, "status": "failed"}])
    assert not table.passed([good, rows[2]]), "the environment alone is no check"
    table.write(tmp_path, rows, {"title": "GPU suite: a card", "seconds": 9.0, "notes": ["toy sizes"]})
    text = (tmp_path / "gpu.md").read_text()
    assert "| a | passed | 3 \\| 4 | 3 |\n| b | passed" in text
    assert "2 passed, 0 failed, 1 skipped in 9 s" in text
    assert "toy sizes" in text
    assert json.loads((tmp_path / "gpu.json").read_text())["passed"] is True


def test_the_words_of_only_choose_checks_with_what_they_need() -> None:
    from gpu import plan

    names = {check.name for check in plan.chosen("resume,speed-8b-lora")}
    assert names == {"environment", "model-small", "deterministic", "resume", "model-8b", "speed-8b-lora"}
    assert {check.name for check in plan.chosen("exact")} == {"environment", "exact-float32", "exact-bfloat16"}
    assert all(check.quick for check in plan.chosen("quick"))
    assert plan.chosen("") == plan.CHECKS
    with pytest.raises(ValueError, match="no check exat; there are quick, environment"):
        plan.chosen("exat")
    for check in plan.CHECKS:
        module, function = check.function.split(".")
        assert callable(getattr(importlib.import_module(f"gpu.{module}"), function)), check
        assert set(check.needs) <= plan.BY_NAME.keys()


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [(["-x"], {}, "no option '-x'"), (["a", "b"], {}, "one argument"), ([], {"DEVICE": "tpu"}, "DEVICE is cuda or cpu"),
     ([], {"ONLY": "exat"}, "no check exat")],
)  # fmt: skip
def test_wrong_input_is_refused(arguments: list[str], environment: dict[str, str], said: str) -> None:
    command, more = ["bash", str(ROOT / "launch" / "gpu.sh"), *arguments], {"HALOS_PYTHON": sys.executable, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **more})
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


# --- configurations and yardsticks -------------------------------------------------------------------------------------


def test_every_short_run_is_a_valid_configuration(cache: Path, tmp_path: Path) -> None:
    from gpu.crashes import RUNS, WIDE

    wide = {name: [*words, "model=tiny", "data=arithmetic"] for name, (_, words) in WIDE.items()}
    for name, words in {**RUNS, **wide}.items():
        try:
            composed.config_of(*words, f"output_root={tmp_path}", "exp_name=one", f"cache_dir={cache}")
        except UserError as error:
            pytest.fail(f"{name}: {error}")


def test_the_peak_is_of_the_data_sheet_where_it_has_the_card() -> None:
    from gpu.card import peak

    assert peak("NVIDIA H100 80GB HBM3", "bfloat16", 7e14)[0] == 989e12
    assert peak("NVIDIA H100 PCIe", "bfloat16", 7e14)[0] == 756e12
    assert peak("NVIDIA L40S", "bfloat16", 7e14)[0] == 362e12
    value, source = peak("NVIDIA Made Up", "bfloat16", 7e14)
    assert value == 7e14
    assert "measured" in source
    assert peak("NVIDIA H100 PCIe", "float32", 4e13)[0] == 4e13


def test_speed_counts_useful_tokens_and_what_was_computed_before_the_first_step() -> None:
    from gpu.speed import describe, figures

    record = {
        "steps": [{"seconds": 2.0, "tokens": 300}, {"seconds": 1.0, "tokens": 100}], "prepared_s": 2.0, "row_tokens": 800,
        "row_flops": 8e6, "peak_mib": 3072.0, "loaded_mib": 1024.0, "reserved_mib": 4096.0,
        "synchronisations": {"a:1": 2, "b:2": 1}, "microbatch_tokens": 4096,
    }  # fmt: skip
    found = figures(record, 1e7)
    assert found["tokens_per_s"] == pytest.approx(100.0)  # 400 tokens, in 3 s and half of the 2 s before
    assert found["mfu"] == pytest.approx(0.1)  # 10,000 FLOPs a token
    assert found["above_model_gib"] == 2.0
    assert found["synchronisations"] == 3
    assert "100 tokens/s, MFU 10.0%" in describe(found)


def test_synchronisations_are_counted_by_the_line_that_waits() -> None:
    from gpu.hooks import PACKAGE, Synchronisations

    counter, shown = Synchronisations(), warnings.showwarning
    code = (
        "import warnings\nfor _ in range(2):\n    warnings.warn('called a synchronizing CUDA operation')\nwarnings.warn('other')"
    )
    counter.begin()
    exec(compile(code, f"{PACKAGE}trainers/base.py", "exec"), {})
    counter.end()
    assert counter.places == {"trainers/base.py:3": 2}
    assert warnings.showwarning is shown


def test_the_kernels_yardsticks_are_float64_and_notice_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from gpu import kernels

    errors = [
        kernels.attention_error("cpu", torch.float32),
        *(kernels.head_error("cpu", torch.float32, each) for each in (False, True)),
    ]
    assert min(errors) > 0
    assert max(errors) < 1e-6
    right = kernels.attend_by_tree
    monkeypatch.setattr(kernels, "attend_by_tree", lambda *a, trees: right(*a, trees=((120,), (120,), (156,))))
    assert kernels.attention_error("cpu", torch.float32) > 0.1, "a branch that sees its sibling"


def test_one_kernel_for_all_sequences_is_measured_beside_one_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from gpu import kernels, varlen
    from gpu.place import Place

    place, trees = Place("", "cpu", quick=True), ((9, 4, 6), (8,), (7, 3, 2, 5))
    found = varlen.measured(place, trees, torch.float32, window=4)
    assert found["segments ms"] > 0 < found["varlen ms"]
    assert not found["taken"], "a CPU has no such kernel"
    assert varlen.repeats(place, trees, torch.float32)
    assert varlen.check("varlen", place).status == "skipped"
    given: list[bool] = []
    monkeypatch.setattr(varlen, "attend_in_one_call", lambda *a, **more: given.append(True) or kernels.attend_by_tree(*a, **more))
    assert kernels.attention_error("cpu", torch.float32, varlen.attend_in_one_call) < 1e-6
    assert given == [True]
    monkeypatch.setattr(varlen, "attend_in_one_call", lambda *a, **more: (torch.rand(1) * a[1] * a[2].sum() * a[3].sum(), None))
    assert not varlen.repeats(place, trees, torch.float32)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_the_naive_step_is_the_trainers(loss: str, trainer: Callable[..., Trainer]) -> None:
    from gpu.exact import GRADIENT, Case, errors
    from gpu.naive import Naive

    made = Case(trainer(f"loss={loss}", "peft=lora", "train.max_grad_norm=null", "train.batch_size=6"), loss)
    found = errors(made, np.arange(6))
    assert found["loss"] <= found["permitted"] < 1e-5
    assert 0 < found["gradient"] <= GRADIENT
    if loss == "dpo":
        made.start = Naive(made.trainer.run.model).model  # another reference than the trainer's
        assert errors(made, np.arange(6))["gradient"] > 1e-3


@pytest.mark.slow
def test_the_suite_runs_on_a_cpu_at_toy_sizes(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "DEVICE": "cpu",
        "ONLY": "exact-float32,crash-dpo-lora,resume,merge,syncs",
        "HALOS_PYTHON": sys.executable,
    }
    command = ["bash", str(ROOT / "launch" / "gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    status = {check["name"]: check["status"] for check in found["checks"]}
    assert set(status.values()) == {"passed", "skipped"}
    assert [name for name in status if status[name] == "skipped"] == ["syncs"]
    assert "toy sizes" in (tmp_path / "out" / "gpu.md").read_text()
    assert re.search(r"\| resume \| passed \| killed after step 5", (tmp_path / "out" / "gpu.md").read_text())
