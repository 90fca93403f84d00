"""Every checkpoint of every kind of run leads where the uninterrupted run went; on other numbers of processes too."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from halos.checkpoint.select import checkpoints, step_of
from tests import processes
from tests.launch import spread
from tests.losses import cases

ROOT = Path(__file__).resolve().parents[2]
# 13 rows in batches of 5, two at a time: step 2 is in mid-epoch and accumulates, 3 ends an epoch, 4 follows an evaluation
RUN = ("model=tiny data=arithmetic train.steps=7 train.batch_size=5 train.microbatch_size=2 train.eval_every=4 "
       "checkpoint.keep_last=9 optim.lr=1e-3 data.train=[{path:arithmetic,split:'train[:13]'}] "
       "data.eval=[{path:arithmetic,split:'eval[:7]'}]")  # fmt: skip
POSITIONS = [2, 3, 4]
DROPOUT = "peft=lora peft.lora_dropout=0.1"
MOVING = "peft=none humanline=on"  # a reference that follows the policy, and is a model
SOFT = "reference.sync_every=2 reference.sync_weight=0.6"  # or with LoRA other values
APART = "checkpoint.async_save=true"
Story = dict[str, Any]


def start(mode: str, output: Path, cells: list[str], how: str, world: int) -> None:
    spread.skip_unless_installed(how)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    script = str(ROOT / "tests" / "launch" / "exactness.py")
    done = processes.run(
        [sys.executable, *spread.launcher(how, world), script, mode, str(output), *cells],
        capture_output=True, text=True, check=False, env=environment | spread.settings(how, output),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-40_000:]  # the process that failed first comes first


def story(output: Path, name: str) -> Story:
    return json.loads((output / f"{name}.json").read_text())


def size_of(checkpoint: Path) -> int:
    """Bytes of its files, the tokenizer's apart."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and "tokenizer" not in path.parts]
    return sum(path.stat().st_size for path in files)


def copy_until(output: Path, name: str, step: int, copy: str) -> None:
    """`copy`: the run as it was when its process died right after the save of `step`."""
    target = output / copy
    shutil.copytree(output / name, target)
    for path in checkpoints(target / "checkpoints"):
        if step_of(path) > step:
            shutil.rmtree(path)
    shutil.rmtree(target / "FINAL")
    (target / "result.json").unlink()
    config = (target / "config.yaml").read_text()
    (target / "config.yaml").write_text(config.replace(f"run_dir: {output / name}", f"run_dir: {target}"))


def cells_of(losses: list[str], pefts: list[str]) -> dict[str, str]:
    return {f"{loss}-{number}": f"loss={loss} {peft}" for loss in losses for number, peft in enumerate(pefts)}


OPTIMIZERS = {  # and schedules: every shipped one that needs no further package, with the ways that rates are had
    "muon": "loss=sft peft=none optim=muon schedule=wsd optim.weight_decay=0.1",
    "adafactor": "loss=dpo peft=none optim=adafactor schedule=inverse_sqrt +optim.lr_by_name.norm=1e-2",
    "adam": "loss=sft peft=lora optim=adam optim.loraplus_lr_ratio=4 schedule=linear",
    "rmsprop": "loss=sft peft=lora +optim.name=rmsprop +schedule.name=constant",
    "sgd": "loss=sft peft=none optim=sgd",
}


# runs of the other kinds are killed and resumed in tests/checkpoint/test_resume.py, and all of them in the long matrix
KINDS_NOT_KILLED = cases.one_of_each_kind(but=("sft", "dpo", "kto", "reward"))


@pytest.mark.parametrize(
    ("strategy", "cells", "positions"),
    [
        (("fsdp2", 2), cells_of(["dpo"], [DROPOUT, MOVING]), [3]),
        (("alone", 1), cells_of(KINDS_NOT_KILLED, ["peft=none"]) | OPTIMIZERS, [3]),
        pytest.param(("ddp", 2), cells_of(["kto"], [f"peft=none {APART}"]) | OPTIMIZERS, [2], marks=pytest.mark.slow),
        *(
            pytest.param(
                strategy,
                cells_of(cases.one_of_each_kind(), ["peft=none", DROPOUT, f"{DROPOUT} {APART}"])
                | cells_of(["dpo", "kto"], [f"{MOVING} {APART}", f"{DROPOUT} {SOFT}"]),
                POSITIONS,
                marks=pytest.mark.slow,
            )
            for strategy in (("alone", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("zero3", 2))
        ),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    strategy: tuple[str, int], cells: dict[str, str], positions: list[int], tmp_path: Path, cache: Path
) -> None:
    every = f"checkpoint.every={3 if positions == [3] else 1}"
    start("train", tmp_path, [f"{name}={words} {RUN} {every} cache_dir={cache}" for name, words in cells.items()], *strategy)
    copies = {f"{name}-from-{step}": (name, step) for name in cells for step in positions}
    for copy, (name, step) in copies.items():
        copy_until(tmp_path, name, step, copy)
    start("resume", tmp_path, list(copies), *strategy)
    for name, words in cells.items():
        for path in checkpoints(tmp_path / name / "checkpoints"):
            if "lora" in words:
                assert size_of(path) <= (3.2 + ("sync" in words)) * story(tmp_path, name)["trained bytes"] + 1e6, path
    for copy, (name, step) in copies.items():
        whole, resumed = story(tmp_path, name), story(tmp_path, copy)
        assert whole["before"] == whole["saves"], f"{name}: a save changed what was trained"
        assert resumed["start"] == whole["saves"][str(step)], copy
        assert resumed["saves"]["final"] == whole["saves"]["final"], copy
        assert resumed["ahead"] == whole["ahead"], copy
        assert resumed["losses"] == [line for line in whole["losses"] if line[1] > step], copy
        assert resumed["batches"] == {k: ids for k, ids in whole["batches"].items() if int(k) >= step}, copy


PLACES = [("alone", 1), ("ddp", 2), ("ddp", 3), ("ddp", 4), ("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2", 4)]
ENGINES = [("alone", 1), ("fsdp2", 2), ("zero1", 2), ("zero2", 3), ("zero3", 1), ("zero3", 2), ("zero3", 3)]
ELASTIC = {
    "sft": "loss=sft peft=none",
    "dpo": "loss=dpo peft=lora",
    "kto": "loss=kto peft=lora",
    "reward": "loss=reward peft=lora",
    "moving": f"loss=dpo {MOVING}",
    "ppo": "loss=ppo loss.kl_target=0.1 peft=lora",
}


@pytest.mark.parametrize(
    ("places", "names"),
    [
        ([("fsdp2", 2), ("zero3", 2)], ["sft"]),
        pytest.param(PLACES, list(ELASTIC), marks=pytest.mark.slow),
        pytest.param(ENGINES, ["kto", "moving", "ppo"], marks=pytest.mark.slow),
    ],
    ids=["two", "torch's own", "with DeepSpeed"],
)
def test_a_run_resumes_on_any_number_of_ranks(
    places: list[tuple[str, int]], names: list[str], tmp_path: Path, cache: Path
) -> None:
    tag = {place: f"{place[0]}{place[1]}" for place in places}
    for place in places:
        cells = [f"{name}-{tag[place]}={ELASTIC[name]} {RUN} checkpoint.every=3 cache_dir={cache}" for name in names]
        start("train", tmp_path, cells, *place)
        for name in names:
            with safe_open(tmp_path / f"{name}-{tag[place]}" / "FINAL" / "model.safetensors", "pt") as final:
                assert "model.embed_tokens.weight" in final.keys()  # noqa: SIM118  it is no dictionary
                assert "lm_head.weight" not in final.keys(), "tied, and written once"  # noqa: SIM118
    for place in places:
        moves = {f"{name}-{tag[source]}-to-{tag[place]}": f"{name}-{tag[source]}" for name in names for source in places}
        for copy, name in moves.items():
            copy_until(tmp_path, name, 3, copy)
        start("resume", tmp_path, list(moves), *place)
        for copy, name in moves.items():
            whole, moved = story(tmp_path, name), story(tmp_path, copy)
            assert moved["start"]["parameters"] == whole["saves"]["3"]["parameters"], copy
            assert moved["start"]["optimizer"] == whole["saves"]["3"]["optimizer"], copy
            assert moved["batches"] == {k: ids for k, ids in whole["batches"].items() if int(k) >= 3}, copy
            expected = [line for line in whole["losses"] if line[1] > 3]
            assert [line[:2] for line in moved["losses"]] == [line[:2] for line in expected]
            for mine, theirs in zip(moved["losses"], expected, strict=True):
                assert mine[2] == pytest.approx(theirs[2], rel=1e-6, abs=1e-6), copy
