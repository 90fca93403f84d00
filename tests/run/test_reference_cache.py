"""The reference's log-probs as data: the same steps as with a reference model, which is held at no step; never stale or wrong."""

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from weakref import ReferenceType, ref

import numpy as np
import pytest
import torch
import yaml
from conftest import compose
from safetensors.torch import load_file, save_file
from world import World, pairs, resume, stopped

from halos.config.bind import bind_loss
from halos.config.schema import Config
from halos.data.collate import pack
from halos.distributed.launch import make_accelerator
from halos.errors import UserError
from halos.examples import Item, PackRow
from halos.logps import compiled
from halos.run import models
from halos.run.assemble import assemble
from halos.run.reference import decision
from halos.trainers import reference, reference_rows
from halos.trainers.base import Trainer
from halos.trainers.logps_table import LogpsCache
from halos.trainers.reference import ReferenceLogps
from halos.types import LossInput, Pair

UNPROVED = "train.prove=off"  # which other tests prove
SHORT = (UNPROVED, "train.steps=2", "checkpoint.every=null")
SCORED = [json.dumps({"type": "scalar_feedback", "prompt": f"Count {n}", "output": f"it is {n * k}", "reward": k}) + "\n"
          for n in range(8) for k in (0.0, 1.0, 2.0)]  # fmt: skip
TIMES = re.compile(r"seconds|tokens_per_second|peak_memory|written")


@pytest.fixture
def world(tmp_path: Path, cache: Path) -> World:
    """Without log-probs of earlier tests in its cache."""
    shutil.rmtree(cache / "reference", ignore_errors=True)
    return World(tmp_path / "world", cache)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the rows whose log-probs were computed."""
    names, compute = list[str](), ReferenceLogps._compute

    def counted(self: ReferenceLogps, source: Any, cache: LogpsCache) -> None:
        names.append(source.name)
        compute(self, source, cache)

    monkeypatch.setattr(ReferenceLogps, "_compute", counted)
    return names


def assembled(world: World, name: str, *words: str) -> Trainer:
    config = compose(world.cache, world.place / "runs", *world.words(name, "reference.cache=always", UNPROVED, *words))
    trainer = assemble(config, [], make_accelerator(config.train.precision, config.model.dtype))
    assert trainer is not None
    return trainer


def metrics(directory: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if isinstance(value, float | int) and not TIMES.search(name)} for row in rows
    ]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "FINAL" / "model.safetensors")


def rows_of(trainer: Trainer) -> list[PackRow]:
    return trainer.rows([trainer.train.rows[n] for n in range(8)])


def known(trainer: Trainer) -> torch.Tensor:
    trainer.prepare_reference()
    return trainer._reference(trainer._pack_rows(rows_of(trainer)).to(torch.device("cpu"))).values


@pytest.mark.parametrize("words", [("loss=dpo",), ("loss=kto", "peft=lora", "train.steps=7"), ("loss=grpo",)], ids=" ".join)
def test_steps_and_evaluations_equal_those_with_a_live_reference(words: tuple[str, ...], world: World) -> None:
    if words == ("loss=grpo",):
        for path, count in ((world.data, 24), (world.eval_data, 6)):
            path.write_text("".join(SCORED[:count]))
        words = ("loss=grpo", "loss.beta=0.1")
    more = [*words, UNPROVED, "train.eval_at_start=true", "checkpoint.every=null"]
    directories = [world.train(cache, *more, f"reference.cache={cache}") for cache in ("never", "auto")]
    live, kept = map(metrics, directories)
    assert len(live) == len(kept) >= 6
    for one, other in zip(live, kept, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    written = [yaml.safe_load((path / "config.yaml").read_text())["reference"]["cache"] for path in directories]
    assert written == ["never", "always"], "a resume keeps what was decided"
    if words == ("loss=dpo",):
        assert kept[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(kept[-2]["loss"] - math.log(2)) > 1e-3, "and then it moves"
    files = list((world.cache / "reference").glob("*/manifest.json"))
    assert len(files) == (4 if words[0] == "loss=kto" else 2), "of data for training and evaluation, with KTO's mismatched rows"


def test_no_reference_model_is_held_during_steps(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, held, step, load = list[ReferenceType[Any]](), list[int](), Trainer.step, models.load_reference

    def watched(*words: Any, **more: Any) -> Any:
        model = load(*words, **more)
        loaded.append(ref(model))
        return model

    def counted(self: Trainer, indices: np.ndarray) -> Any:
        held.append(sum(model() is not None for model in loaded))
        return step(self, indices)

    monkeypatch.setattr(models, "load_reference", watched)
    monkeypatch.setattr(Trainer, "step", counted)
    world.train("own", *SHORT)
    assert not loaded, "not even for the pass: the policy is its own reference at the start"
    named = f"reference.name_or_path={shutil.copytree(world.base, world.place / 'named')}"
    world.train("named", *SHORT, named, "train.temperature=0.9")
    assert len(loaded) == 1, "once for both data sets"
    assert held == [0] * 4
    world.train("live", *SHORT, named, "reference.cache=never")
    assert held[4:] == [1] * 2, "this would see one"


def changed_weights(world: World) -> tuple[str, ...]:
    path = world.base / "model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(path).items()}, path, {"format": "pt"})
    return ()


def changed_rows(world: World) -> tuple[str, ...]:
    world.data.write_text("\n".join(pairs(24, word="on")))
    return ()


def changed_config(world: World) -> tuple[str, ...]:
    path = world.base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))
    return ()


STALE: dict[str, Callable[[World], tuple[str, ...]]] = {
    "other weights under the same path": changed_weights,
    "another config.json": changed_config,
    "other data of the same lengths": changed_rows,
    "dtype": lambda _: ("model.dtype=bfloat16",),
    "precision": lambda _: ("train.precision=bfloat16",),
    "temperature": lambda _: ("train.temperature=0.7",),
    "compiled code": lambda _: ("train.compile=true",),
    "vocabulary": lambda _: ("model.add_tokens=['<|new|>']",),
}


def test_what_the_numbers_depend_on_is_noticed_and_nothing_else(
    world: World, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "compile_regions", lambda model, like=None: None)
    assembled(world, "first").prepare_reference()
    assert computed == ["train", "eval"]
    same = ("loss=ipo", "optim.lr=1e-2", "seed=3", "train.batch_size=6", "train.microbatch_tokens=99", "train.steps=9")
    lora = ("peft=lora", "peft.r=2", "reference.adapter=off")
    for n, words in enumerate((same, lora)):
        assembled(world, f"same{n}", *words).prepare_reference()
    assert computed == ["train", "eval"], "jobs of a sweep share them"
    for n, (what, change) in enumerate(STALE.items()):
        computed.clear()
        trainer = assembled(world, f"stale{n}", *change(world))
        trainer.prepare_reference()
        assert "train" in computed, what
        rows = rows_of(trainer)
        with trainer.run.accelerator.autocast():
            assert known(trainer).allclose(trainer._refer(pack(rows)).values, atol=1e-5 if "float" not in what else 0.05), what


def test_a_named_reference_is_noticed_to_have_grown_with_the_vocabulary(world: World, computed: list[str]) -> None:
    """Its head has a row for each new token too, and each takes a part of the probability."""
    named = f"reference.name_or_path={shutil.copytree(world.base, world.place / 'named')}"
    first, grown = (
        known(assembled(world, f"grown{n}", named, *words)) for n, words in enumerate(((), STALE["vocabulary"](world)))
    )
    live = assembled(world, "live", named, *STALE["vocabulary"](world), "reference.cache=never")
    expected = live._refer(live.packed(rows_of(live))).values
    assert grown.allclose(expected, atol=1e-5)
    assert not first.allclose(expected, atol=1e-4)


def test_a_policy_that_was_moved_before_the_pass_is_not_read_as_its_own_start(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = assembled(world, "live", "reference.cache=never")
    expected = live._refer(live.packed(rows_of(live))).values

    def moved(self: Trainer, parts: Any) -> None:
        begin(self, parts)
        for parameter in self.run.module.parameters():
            parameter.data.mul_(1.1)

    begin = Trainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__init__", moved)
        by_trainer = assembled(world, "trainer")
    assert known(by_trainer).allclose(expected, atol=1e-5)
    shutil.rmtree(world.cache / "reference")
    alone = assembled(world, "alone")
    with torch.no_grad():
        next(alone.run.module.parameters()).add_(1e-12)  # which no sum of its values shows
    loaded, load = list[Any](), models.load_reference
    monkeypatch.setattr(models, "load_reference", lambda *words, **more: loaded.append(words) or load(*words, **more))
    alone.step(alone.order.batch(0))
    assert len(loaded) == 1


def test_a_damaged_table_is_computed_again_and_compared_with_that_of_the_start(
    world: World, computed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = assembled(world, "first")
    first, recorded = known(trainer), trainer.run.reference
    files = sorted((world.cache / "reference").glob("*/logps.npy"))
    assert len(files) == 2
    for n, path in enumerate(files):
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data if n else data[:-4])
    computed.clear()
    again = assembled(world, "again")
    again.run.reference = dict(recorded)
    assert torch.equal(known(again), first)
    assert computed == ["train", "eval"]
    assert "bit for bit" not in caplog.text
    moved = assembled(world, "moved")
    moved.run.reference = {"train": f"{recorded['train'].split()[0]} {'0' * 64}"}  # of another machine
    moved.prepare_reference()
    assert "log-probs of train had to be computed again, and differ" in caplog.text
    assert "of eval had" not in caplog.text


def test_a_table_that_no_disk_keeps_is_not_computed_for_ever(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = assembled(world, "first")
    monkeypatch.setattr(LogpsCache, "open", lambda self: None)
    with pytest.raises(UserError, match=r"cannot be read again as it was written.*reference\.cache=never"):
        trainer.prepare_reference()


def test_an_interrupted_pass_goes_on_where_it_was(world: World, computed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_rows, "PART", 200)
    whole = assembled(world, "whole", "train.microbatch_tokens=20")
    whole.prepare_reference()
    before = dict(whole.run.reference)
    shutil.rmtree(world.cache / "reference")

    forward, passes = ReferenceLogps._forward, list[int]()

    def killed(self: ReferenceLogps, *words: Any) -> list[np.ndarray]:
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return forward(self, *words)

    monkeypatch.setattr(ReferenceLogps, "_forward", killed)
    again = assembled(world, "again", "train.microbatch_tokens=20")
    with pytest.raises(KeyboardInterrupt):
        again.prepare_reference()
    (place,) = (world.cache / "reference").glob("*.parts")
    assert len(list(place.glob("*.safetensors"))) == 2
    assert not list((world.cache / "reference").glob("*/manifest.json")), "nothing that looks whole"
    (place / ".000002.safetensors").write_bytes(b"half a file")
    torn = place / "000001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    again.prepare_reference()
    assert again.reference_logps is not None
    cut = again.settings, again.bounds.tokens
    total = sum(len(reference_rows.Plan.of(each, *cut, is_checkpointed=False).parts) for each in again.reference_logps._sources)
    assert len(passes) == 3 + total - 1, "all but the whole part"
    assert again.run.reference == before
    assert not list((world.cache / "reference").glob("*.parts"))


def test_a_stopped_pass_stops_the_run_and_is_resumed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_rows, "PART", 200)
    trainer = assembled(world, "stops", "train.microbatch_tokens=20")
    forward = ReferenceLogps._forward

    def asked(self: ReferenceLogps, *words: Any) -> list[np.ndarray]:
        self.run.stop_requested = "SIGTERM"
        return forward(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceLogps, "_forward", asked)
        trainer.fit()
    assert trainer.run.stopped_early
    assert trainer.run.step == 0
    assert not list((world.cache / "reference").glob("*/manifest.json"))


def test_a_resume_with_another_cache_keeps_the_old_log_probs_of_rollouts(world: World) -> None:
    world.data.write_text("".join(SCORED))
    words = ("loss=grpo", "loss.beta=0.1", "optim.lr=3e-2", "train.batch_size=6", "data.eval=[]", "objective.metric=loss",
             "objective.mode=min", UNPROVED)  # fmt: skip
    directory = world.train("first", *words, "reference.cache=always")
    whole = weights(directory)
    for cache in ("never", "always"):
        assert resume(stopped(directory), f"reference.cache={cache}") == 0
        for name, value in weights(directory).items():
            assert value.allclose(whole[name], atol=1e-6), (cache, name)


def test_a_resume_loads_no_reference_and_computes_a_lost_one_again(
    world: World, computed: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = world.train("whole", UNPROVED)
    directory = stopped(world.train("again", UNPROVED))
    other = Path(shutil.copytree(directory, world.place / "runs" / "other"))
    computed.clear()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a reference is loaded")

    with monkeypatch.context() as patch:
        patch.setattr(models, "load_reference", refuse)
        assert resume(directory) == 0
    assert not computed
    shutil.rmtree(world.cache / "reference")
    assert resume(other) == 0
    assert computed == ["train", "eval"]
    assert "bit for bit" not in caplog.text
    for each in (directory, other):
        assert [row["loss"] for row in metrics(each)] == [row["loss"] for row in metrics(whole)]
        assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(each).items())


def test_a_run_waits_for_another_that_computes_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch, computed: list[str]
) -> None:
    trainer = assembled(world, "first")
    assert trainer.reference_logps is not None
    facts = {**trainer.reference_logps._cache.depends_on, **trainer.reference_logps._sources[0].facts}
    other, naps = LogpsCache(world.cache, facts), list[float]()
    assert other.acquire()

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            other.release()

    monkeypatch.setattr(reference.time, "sleep", nap)
    trainer.prepare_reference()
    assert naps == [reference.WAIT] * 2
    assert computed == ["train", "eval"]


@dataclass(frozen=True, slots=True)
class Joined(Pair):
    @classmethod
    def rows(cls, items: Sequence[Item]) -> list[PackRow]:
        return [(item.prompt, items[n - 1].completions[0]) for n, item in enumerate(items)]


def test_auto_is_live_where_a_reference_costs_no_memory_and_is_read_once(configure: Callable[..., Config]) -> None:
    def made(*words: str, total: int = 4, epoch: int | None = 3, cache: str = "auto", name: str | None = None,
             reference: str | None = None, inputs: type[LossInput] = Pair) -> str:  # fmt: skip
        config = configure("loss=dpo", f"reference.cache={cache}", *words)
        config = replace(config, trainer={"_target_": name}, reference=replace(config.reference, name_or_path=reference))
        batches: Any = SimpleNamespace(total=total, steps_per_epoch=epoch)
        return decision(config, replace(bind_loss(config.loss, []), inputs=inputs), batches)

    assert made() == made(total=3) == made("peft=lora") == "always"
    assert made("peft=lora", total=3) == "never"
    assert made("peft=lora", total=3, reference="another") == "always"
    assert made(name="mine.Trainer") == "never", "it may read its reference itself"
    assert made(inputs=Joined) == "never", "its rows may be of several items"
    assert made(inputs=Joined, cache="always") == "always"
    assert made(epoch=None) == "never", "a live loop"
    assert made(cache="never") == "never"
    assert made("peft=lora", total=3, cache="always") == made(name="mine.Trainer", cache="always") == "always"
    with pytest.raises(UserError, match=r"reference\.cache=always: a live loop learns from what it has just sampled"):
        made(epoch=None, cache="always")
    config = configure("loss=sft")
    assert decision(config, bind_loss(config.loss, []), cast(Any, None)) == "auto", "nothing to decide"


def test_in_bfloat16_the_first_log_ratio_is_no_larger_than_between_two_cuts(world: World) -> None:
    words = ("train.precision=bfloat16", f"model.name_or_path={world.base}")
    trainer = assembled(world, "half", *words)
    rows = rows_of(trainer)

    def live(count: int) -> torch.Tensor:
        with torch.no_grad(), trainer.run.accelerator.autocast():
            parts = [trainer._refer(pack(rows[n : n + count])) for n in range(0, len(rows), count)]
        return torch.cat([part.values[part.mask] for part in parts])

    trainer.prepare_reference()
    whole = trainer._reference(trainer._pack_rows(rows).to(torch.device("cpu")))
    kept = whole.values[whole.mask]
    cuts = [live(count) for count in (1, 2, 4, 16)]
    between = max((one - other).abs().max().item() for one in cuts for other in cuts)
    for each in cuts:
        assert (each - kept).abs().max().item() <= between + 1e-6


def test_rows_that_no_data_set_has_are_refused(world: World) -> None:
    trainer = assembled(world, "first")
    prompt, completion = rows_of(trainer)[0]
    with pytest.raises(RuntimeError, match="before Trainer"):  # a policy that has moved is no reference
        trainer._pack_rows([(prompt, completion)])
    trainer.prepare_reference()
    with pytest.raises(UserError, match=r"are not those of its items alone.*reference\.cache=never"):
        trainer._pack_rows([(prompt[1:], completion)])
