"""Online runs from start to end, killed in every stage: the same samples, the same feedback, the same weights."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import attempts

import train
from halos.checkpoint import __main__ as cli
from halos.checkpoint.lineage import identity
from halos.data.tokenize import Encoder
from halos.errors import UserError
from halos.hooks.base import Hook
from halos.models import tiny
from halos.models.load import load_model, load_tokenizer
from halos.models.locate import locate
from halos.online import rounds
from halos.online.plan import OnlinePlan, _last_checkpoint
from halos.online.records import meta_path, read, write, write_sealed
from halos.online.round import Round, RoundResult
from halos.online.rounds import stored_overrides
from halos.online.stages import Stages, StoppedError
from halos.rollout import spent
from halos.rollout.types import Prompt, Rollout, Row, Sample, Score
from halos.rundir import RunDir
from tests import processes
from tests.rollout.vllm_server import servers_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "loss=online", "model=tiny", "data=arithmetic", "online.rounds=2", "online.prompts_per_round=6",
    "online.samples_per_prompt=3", "online.eval_prompts=4", "online.eval_samples=2",
    "online.eval_temperature=0.7", "online.sampler.max_new_tokens=8", "online.sampler.batch_size=4", "online.kl_samples=4",
    "online.scorer.functions=[{function: length, target: 3}]", "train.batch_size=6", "optim.lr=1e-3",
    "data.train=[{path: arithmetic, split: 'train[:48]'}]", "data.eval=[{path: arithmetic, split: 'eval[:12]'}]",
]  # fmt: skip


class StartedRun:
    """train.py with the overrides of an online run, as a user starts it; every further start resumes."""

    def __init__(self, place: Path, cache: Path, words: list[str], environment: dict[str, str] | None = None) -> None:
        self.run = place / "online"
        common = [f"output_root={place}", "exp_name=online", f"cache_dir={cache}"]
        self.words = [*SMALL, *common, *words]
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}

    def start(self, *more: str) -> subprocess.Popen[str]:
        begun = (self.run / "config.yaml").is_file() and (self.run / "attempts").is_dir()
        again = [word for word in self.words if ".url=" in word]  # where keys are sent is typed at every start
        words = [f"resume={self.run}", *again] if begun else [*self.words, "overwrite=false"]
        return processes.Popen([sys.executable, str(ROOT / "train.py"), *words, *more], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env=self.environment, cwd=self.run.parent)  # fmt: skip

    def finish(self, *more: str) -> str:
        process = self.start(*more)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
        return said

    def result(self) -> dict[str, Any]:
        return json.loads((self.run / "result.json").read_text())

    def story(self) -> dict[str, str]:
        """Everything that must not depend on what happened to the run, by hash."""
        found = {}
        for path in sorted(self.run.glob("rounds/*/*.jsonl")) + sorted(self.run.glob("exam/*.jsonl")):
            rows = [{name: value for name, value in row.items() if name != "generator"} for row in read(path)]
            found[str(path.relative_to(self.run))] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return {**found, "FINAL": identity(self.run / "FINAL")}

    def rows(self, split: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["split"] == split]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Callable[[str], StartedRun]:
    """A finished online run of a loss, run once."""
    made: dict[str, StartedRun] = {}

    def of(loss: str) -> StartedRun:
        if loss not in made:
            made[loss] = StartedRun(tmp_path_factory.mktemp(loss), cache, [f"online.loss={loss}"])
            made[loss].finish()
        return made[loss]

    return of


def test_an_online_run_leaves_metrics_samples_feedback_and_a_final_model(whole: Callable[[str], StartedRun]) -> None:
    started = whole("dpo")
    assert started.result()["status"] == "finished"
    names = {path.name for path in (started.run / "rounds" / "000").iterdir()}
    assert names >= {"prompts.jsonl", "samples.jsonl", "feedback.jsonl", "train", "round.json", "samples.md", "samples.html"}
    assert [row["step"] for row in started.rows("train")] == [0, 1]
    assert [row["step"] for row in started.rows("eval")] == [0, 1, 2]
    second = started.rows("train")[1]
    assert {"reward", "reward/std", "length", "kl", "unique", "cost"} <= second.keys()
    parts = {name.removeprefix("seconds/") for name in second if name.startswith("seconds/")}
    assert parts == {"sample", "score", "train", "start"}
    first, *_ = started.rows("eval")
    assert all(0 < row["mismatch/mean"] <= row["mismatch/max"] < 1e-4 for row in started.rows("train"))
    assert first["win_rate"] == 0.5
    assert (first["samples"], first["avg@2"]) == (8, first["reward"])
    assert {"pass@1", "pass@2", "pass@2/ci_low", "win_rate/ci_high", "without_score"} <= first.keys()
    answers = [
        [(row["prompt_id"], row["sample_id"], row["seed"], row["temperature"]) for row in read(directory / "samples.jsonl")
         if row["split"] == "eval"]
        for directory in (*sorted((started.run / "rounds").iterdir()), started.run / "exam")
    ]  # fmt: skip
    assert answers[0] == answers[1] == answers[2], "the same random numbers at every evaluation"
    assert len({seed for _, _, seed, _ in answers[0]}) == 8
    assert {temperature for *_, temperature in answers[0]} == {0.7}
    assert first["reward/ci_low"] < first["reward"] < first["reward/ci_high"]
    assert " train, " in (said := (started.run / "train.log").read_text().split("round 0 of 2")[1].splitlines()[0])
    assert said.endswith(" start")
    last = started.rows("eval")[-1]
    assert last["seconds/sample"] > 0, "the last policy's evaluation is no part of a round"
    assert f"held-out reward {first['reward']:.4g} ({first['reward/ci_low']:.3g} to" in (started.run / "train.log").read_text()
    feedback = read(started.run / "rounds" / "000" / "feedback.jsonl")
    for name in ("generator_sha256", "labeller", "prompt_id", "seed_A", "seed_B", "reward_A", "cost"):
        assert feedback[0][name] is not None
    model = AutoModelForCausalLM.from_pretrained(started.run / "FINAL")
    last = AutoModelForCausalLM.from_pretrained(started.run / "rounds" / "001" / "train" / "FINAL")
    first = AutoModelForCausalLM.from_pretrained(started.run / "rounds" / "000" / "train" / "FINAL")
    weights = [torch.cat([p.flatten() for p in each.parameters()]) for each in (model, last, first)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2]), "the second round went on from the first"


def test_each_round_samples_from_the_policy_that_the_last_one_saved(whole: Callable[[str], StartedRun]) -> None:
    started = whole("dpo")
    asked = json.loads((started.run / "rounds" / "001" / "samples.meta.json").read_text())["request"]
    assert asked["model_sha256"] == identity(started.run / "rounds" / "000" / "train" / "FINAL")
    lineage = json.loads((started.run / "FINAL" / "lineage.json").read_text())
    assert len(lineage["runs"]) == 2
    config = (started.run / "rounds" / "001" / "train" / "config.yaml").read_text()
    assert "name_or_path: tiny" in config.partition("reference:")[2], "the reference stays at the start"
    rows = [read(started.run / "rounds" / f"{number:03d}" / "prompts.jsonl") for number in (0, 1)]
    prompts = [{row["prompt_id"] for row in some if row["split"] == "train"} for some in rows]
    assert not prompts[0] & prompts[1]


def test_a_round_trains_on_the_tokens_that_were_sampled_and_adds_none(whole: Callable[[str], StartedRun]) -> None:
    place = whole("dpo").run / "rounds" / "000"
    sampled = {(row["prompt_id"], row["sample_id"]): row for row in read(place / "samples.jsonl")}
    pairs = read(place / "feedback.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(place / "train" / "FINAL")
    prompts = Encoder(tokenizer, max_length=1000, truncation="drop").prompts([(row["prompt"], "here") for row in pairs])
    total = 0
    for pair, prompt in zip(pairs, prompts, strict=True):
        for side in ("A", "B"):
            row = sampled[pair["prompt_id"], pair[f"sample_id_{side}"]]
            assert (pair[f"output_ids_{side}"], pair[f"finish_{side}"]) == (row["output_ids"], row["finish"])
            total += len(prompt) + len(row["output_ids"])
    steps = [json.loads(line) for line in (place / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in steps if row["split"] == "train"] == [total]
    assert any(row["finish"] == "length" for row in sampled.values())


def test_the_optimizers_state_and_one_constant_rate_are_carried_over_rounds(whole: Callable[[str], StartedRun]) -> None:
    trained = [whole("dpo").run / "rounds" / number / "train" for number in ("000", "001")]
    first, second = (yaml.safe_load((run / "config.yaml").read_text()) for run in trained)
    assert [each["schedule"]["_target_"] for each in (first, second)] == 2 * ["halos.schedules.constant"]
    assert (first["schedule"]["warmup"], second["schedule"]["warmup"]) == (0.1, 0)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in trained]
    assert {row["lr"] for some in rows for row in some if row["split"] == "train"} == {1e-3}
    assert second["optim"]["init_from"] == f"{trained[0]}/checkpoints/step-00000001"
    assert not (trained[0] / "checkpoints").exists(), "no round will start from it"
    assert (trained[0] / "FINAL").is_dir()
    (saved,) = (trained[1] / "checkpoints").iterdir()
    state = [load_file(path) for path in (saved / "state" / "optimizer").glob("*.safetensors")]
    steps = {float(value) for part in state for name, value in part.items() if name.endswith("step")}
    assert steps == {2.0}, "one of each round"


def test_a_round_that_is_done_is_not_repeated_though_its_weights_are_deleted(
    whole: Callable[[str], StartedRun], tmp_path: Path
) -> None:
    started = whole("dpo")
    before, rows = started.story(), started.rows("train")
    trained = started.run / "rounds" / "000" / "train" / "FINAL"
    aside = trained.rename(tmp_path / "FINAL")  # online.keep_rounds deletes them
    shutil.rmtree(started.run / "FINAL")
    RunDir(started.run).write_result("stopped", 1, {})
    assert train.start([f"resume={started.run}"]) == 0
    assert not trained.exists()
    aside.rename(trained)
    assert (started.story(), started.rows("train")) == (before, rows)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_round_of_another_size_goes_on_where_the_rounds_before_ended(
    recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("_sample", "_label", "_train", "_result"):
        monkeypatch.setattr(Round, stage, lambda self: None)
    prompts = [Prompt(str(n), ({"role": "user", "content": str(n)},)) for n in range(40)]
    online = SimpleNamespace(samples_per_prompt=2, eval_prompts=0, eval_samples=1, eval_temperature=0.0)
    plan: Any = SimpleNamespace(prompts=prompts, eval_prompts=[], online=online, config=SimpleNamespace(seed=0),
                                directory=RunDir(tmp_path), directory_of=lambda number: tmp_path / f"{number:03d}")  # fmt: skip

    def drawn(number: int, count: int) -> list[str]:
        plan.size = SimpleNamespace(prompts=count)
        Round(plan, number, plan.directory_of(number)).run()
        file = plan.directory_of(number) / "prompts.jsonl"
        if not recorded:  # as an older version wrote it
            meta_path(file).unlink(missing_ok=True)
        return [row["prompt_id"] for row in read(file)]

    first = drawn(0, 12) + drawn(1, 12)
    assert first == drawn(0, 12) + drawn(1, 5), "what a round has drawn is kept"
    every = first + drawn(2, 6) + drawn(3, 10 if recorded else 4)
    assert len({*every}) == len(every) == (40 if recorded else 34)


@pytest.mark.slow
def test_a_finished_run_continues_when_more_rounds_are_requested(tmp_path: Path, cache: Path) -> None:
    started = StartedRun(tmp_path, cache, ["online.loss=sft"])
    started.finish()
    before = started.story()
    started.finish("online.rounds=3", "online.prompts_per_round=9", "resume_changes=allow")
    after = started.story()
    drawn = [row["prompt_id"] for path in sorted(started.run.glob("rounds/*/prompts.jsonl")) for row in read(path)
             if row["split"] == "train"]  # fmt: skip
    assert len(drawn) == len({*drawn}) == 6 + 6 + 9
    assert {name: value for name, value in after.items() if name in before and name.startswith("rounds/00")} == {
        name: value for name, value in before.items() if name.startswith("rounds/00")
    }
    assert after["FINAL"] == identity(started.run / "rounds" / "002" / "train" / "FINAL") != before["FINAL"]
    assert [row["step"] for row in started.rows("eval")] == [0, 1, 2, 3]


@pytest.mark.parametrize("words", [["online.loss=grpo", "peft=lora", "online.carry_optimizer=true", "schedule=constant"],
                                   ["online.loss=ppo", "train.epochs=1"], ["online.loss=kto"]],
                         ids=["grpo, LoRA, optimizer carried", "ppo", "kto"])  # fmt: skip
@pytest.mark.slow
def test_other_losses_train_in_rounds_too(words: list[str], tmp_path: Path, cache: Path) -> None:
    started = StartedRun(tmp_path, cache, words)
    started.finish()
    assert started.result()["status"] == "finished"
    second = (started.run / "rounds" / "001" / "train" / "config.yaml").read_text()
    if "peft=lora" in words:
        assert "rounds/000/train/FINAL/adapter" in second
        assert "rounds/000/train/checkpoints/step-" in second
    if "ppo" in words[0]:
        assert (started.run / "FINAL" / "value_head" / "model.safetensors").is_file()
        log = (started.run / "rounds" / "001" / "train" / "train.log").read_text()
        assert "value head from" in log


STAGES = ("online.sample", "online.label", "train.py")  # of a round; the last exam is a stage of sampling
DRIVER = "driver"


def killed(started: StartedRun, generator: random.Random, stages: Sequence[str], like: StartedRun) -> Counter[str]:
    """Start it again and again, and kill it once in each of these stages at a random moment, given how long the stages of the
    run `like` took; then let it finish. Return how often each stage was hit, since one may be over before the kill."""
    last = like.rows("train")[-1]
    lasts = {name: last[f"seconds/{key}"] for name, key in zip(STAGES, ("sample", "score", "train"), strict=True)}
    hit: Counter[str] = Counter()
    for stage in stages:
        process = started.start()
        below = descendants(process)
        until = time.monotonic() + 300
        while process.poll() is None and stage != DRIVER and not any(stage in command(child) for child in below):
            assert time.monotonic() < until
            time.sleep(0.02)
            below = descendants(process)
        try:
            process.wait(generator.uniform(0.0, lasts.get(stage, 4.0)))
        except subprocess.TimeoutExpired:
            below = descendants(process)
            stages_below = [child for child in below if any(name in command(child) for name in STAGES)]  # not their workers
            victim = process.pid if generator.random() < 0.5 or not stages_below else generator.choice(stages_below).pid
            hit[next((name for name in STAGES if any(name in command(child) for child in below)), DRIVER)] += 1
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            if victim != process.pid:  # a stage that died is told, and the driver leaves
                process.wait(60)
        said = process.communicate()[0]
        assert process.returncode in (0, 1, -signal.SIGKILL), said
        until = time.monotonic() + 60
        while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in below):
            assert time.monotonic() < until, "a process was left behind"
            time.sleep(0.05)
    started.finish()
    return hit


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path: Path, cache: Path, whole: Callable[[str], StartedRun]) -> None:
    started = StartedRun(tmp_path, cache, ["online.loss=kto"])
    assert killed(started, random.Random(1), STAGES, whole("kto")).total() > 0
    assert started.story() == whole("kto").story()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_run_killed_in_every_stage_ends_as_an_uninterrupted_one(
    seed: int, tmp_path: Path, cache: Path, whole: Callable[[str], StartedRun]
) -> None:
    """Twelve runs, killed nine times each."""
    loss = ("dpo", "grpo", "kto")[seed % 3]
    started = StartedRun(tmp_path, cache, [f"online.loss={loss}"])
    hit = killed(started, random.Random(seed), [DRIVER, *STAGES, *STAGES, "online.sample", DRIVER], whole(loss))
    print(f"{loss}: {hit.total()} deaths: {dict(hit)}")
    assert hit.total() >= 5
    assert started.story() == whole(loss).story()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """The stub in a process of its own; what it was paid for so far."""
    port, counts = tmp_path / "port", tmp_path / "counts.json"
    process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "rollout" / "stub.py"), str(port), str(counts)])
    while not port.is_file() or not port.read_text():
        time.sleep(0.05)

    def now() -> dict[str, Any]:
        time.sleep(0.3)
        return {"url": port.read_text(), **json.loads(counts.read_text())}

    yield now
    process.kill()
    process.wait()


@pytest.mark.slow
def test_no_answer_of_a_judge_is_paid_for_twice(
    tmp_path: Path, cache: Path, whole: Callable[[str], StartedRun], server: Callable[[], dict[str, Any]]
) -> None:
    """A run whose judge is a server that is busy, broken and answers nonsense; it is killed several times."""
    judge = ["online.loss=dpo", "online.scorer.name=judge", "online.scorer.model=stub", "online.scorer.functions=[]",
             f"online.scorer.url={server()['url']}", "online.scorer.concurrency=2"]  # fmt: skip
    started = StartedRun(tmp_path, cache, judge, {"OPENAI_API_KEY": "sk-not-a-key"})
    killed(started, random.Random(0), [STAGES[0], STAGES[1], STAGES[1], STAGES[2], STAGES[1]], whole("dpo"))
    told = server()
    kept = [json.loads(line) for line in (started.run / "judge.jsonl").read_text().splitlines()]
    answers = [row for row in kept if "text" in row]
    assert len({row["key"] for row in answers}) == len(answers)
    again = {key: count for key, count in told["paid"].items() if count > 1}
    sent = [row["key"] for row in kept if "text" not in row]
    assert all(sent.count(key) > 1 for key in again), "only what was under way when it died came again, with its own key"
    assert told["paid"].keys() == {row["key"] for row in answers}
    metas = [json.loads(path.read_text()) for path in started.run.glob("rounds/*/scores.meta.json")]
    assert sum(meta["without_score"] for meta in metas) > 0
    assert not any("sk-not-a-key" in path.read_text(errors="ignore") for path in started.run.rglob("*") if path.suffix in
                   (".yaml", ".json", ".jsonl", ".log", ".md"))  # fmt: skip


def test_a_run_stopped_by_a_signal_and_then_killed_ends_as_an_uninterrupted_one(
    tmp_path: Path, cache: Path, whole: Callable[[str], StartedRun]
) -> None:
    started = StartedRun(tmp_path, cache, ["online.loss=dpo"])
    process = started.start()
    until = time.monotonic() + 300
    while not (started.run / "rounds" / "000" / "samples.jsonl").exists():
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert started.result()["status"] == "stopped"
    assert f"resume={started.run}" in said
    again = started.start()
    while not (started.run / "rounds" / "001" / "samples.jsonl.partial").exists():
        assert time.monotonic() < until
        assert again.poll() is None, again.communicate()[0]
        time.sleep(0.02)
    again.kill()  # in the middle of the second round's sampling, and of everything else that it was at
    again.communicate()
    started.finish()
    assert started.story() == whole("dpo").story()


def refused(words: list[str], place: Path, cache: Path) -> str:
    """The one message of a start that is refused."""
    common = [f"output_root={place}", "exp_name=online", f"cache_dir={cache}"]
    with pytest.raises(UserError) as end:
        train.start([*SMALL, *common, *words])
    return str(end.value)


def test_wrong_overrides_are_refused_before_anything_starts(tmp_path: Path, cache: Path) -> None:
    for words, said in (
        ([], "online.loss is missing: the loss that the policy is trained with, such as dpo, grpo,"),
        (["online.loss=ddpo"], "did you mean dpo?"),
        (["online.loss=reward"], "online.loss=reward: "),
        (["online.loss=dpo", "online.overrides=[loss.bta=1]"], "loss.bta"),
        (["online.loss=dpo", "online.samples_per_prompt=1"], "learns from pairs"),
        (["online.loss=dpo", "online.feedback.drop_equal=true"], "online.feedback.drop_equal has no effect on pairwise feedback"),
        (["online.loss=grpo", "online.feedback.threshold=1"], "online.feedback.threshold has no effect on scalar feedback"),
        (["online.loss=grpo", "train.temperature=0.5"], "train.temperature=0.5 and online.sampler.temperature=1 are one number"),
        (["online.loss=grpo", "online.correction=none", "online.correction_cap=3"], "correction_cap has no effect with"),
        (["online.loss=dpo", "online.feedback.kind=binary"], "online.feedback.kind=binary: dpo learns from pairs: prompt"),
        (["online.loss=dpo", "online.scorer.functions=[exact_macth]"], "did you mean exact_match"),
        (["online.loss=dpo", "online.scorer.name=judge"], "online.scorer.model is missing"),
        (["online.loss=dpo", "online.sampler.name=vllm"], "online.sampler.python is missing"),
        (["online.loss=dpo", "online.reference=last", "reference.name_or_path=tiny"], "are two references"),
        (["online.loss=simpo", "reference.name_or_path=tiny"], "uses no reference model"),
        (["online.loss=dpo", "humanline=on", "peft=lora", "online.rounds=2"], "online.reference=last goes with it"),
        (["online.loss=dpo", "online.rouns=3"], "online.rounds"),
        *(
            (
                ["online.loss=dpo", f"online.overrides=[{text}]"],
                f"online.overrides=[{text}]: {text.partition('=')[0]} is of the whole",
            )
            for text in (
                "model.name_or_path=other",
                "data.train=[x.jsonl]",
                "seed=3",
                "run_dir=x",
                "resume=x",
                "experiment=gallery",
                "cache_dir=x",
            )
        ),
        (["online.loss=dpo", "online.overrides=[loss=kto]"], "online.loss names the loss"),
    ):
        assert said in refused(words, tmp_path, cache), words
    assert not (tmp_path / "online").exists()


def test_a_recipe_in_one_file_may_have_the_rounds_in_it_by_the_old_names_too(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "experiment").mkdir()
    recipe = tmp_path / "experiment" / "mine.yaml"
    words = ["--config-dir", str(tmp_path), *SMALL, f"output_root={tmp_path}", "exp_name=online", f"cache_dir={cache}"]
    for timeout, refused_for in ((7, None), (-7, "online.scorer.timeout takes a number \\(above 0\\), not -7")):
        recipe.write_text(f"# @package _global_\nonline: {{loss: dpo, labeller: {{timeout: {timeout}}}}}\n")
        with nullcontext() if refused_for is None else pytest.raises(UserError, match=refused_for):
            assert train.start([*words, "experiment=mine", "dry_run=true"]) == 0, "and its rounds' training has no rounds"


def test_a_saved_run_says_neither_what_is_run_nor_where_keys_are_sent(whole: Callable[[str], StartedRun]) -> None:
    """A run directory may be a stranger's."""
    config = Path(whole("dpo").run / "config.yaml")
    text = config.read_text()
    try:
        for change, said in (
            (("name: function", "name: judge"), "online.scorer.url=http://evil/v1"),
            (("name: hf", "name: vllm"), "online.sampler.python=/tmp/evil"),
        ):
            evil = text.replace(*change).replace("url: null", "url: http://evil/v1").replace("python: null", "python: /tmp/evil")
            evil = evil if "judge" in change[1] else evil.replace("url: http://evil/v1", "url: null")
            config.write_text(evil.replace("model: null", "model: m"))
            with pytest.raises(UserError, match=rf"names {said}.*pass it again"):
                train.start([f"resume={whole('dpo').run}", "resume_changes=allow"])
    finally:
        config.write_text(text)


def test_scores_that_are_all_equal_end_the_run_and_keep_its_files(tmp_path: Path, cache: Path) -> None:
    process = StartedRun(tmp_path, cache, ["online.loss=dpo", "online.scorer.functions=[exact_match]"]).start()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert "there is nothing to learn from: the scores of all samples of a prompt are equal" in said
    assert (tmp_path / "online" / "rounds" / "000" / "samples.jsonl").is_file()


def test_fewer_rounds_than_are_done_are_refused_and_no_metrics_are_lost(begun: Path) -> None:
    note = begun / "rounds" / "001" / "round.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "done": True}))
    metrics = (begun / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"has done 2 rounds, and would end after 1: give online.rounds=2 or more"):
        train.start([f"resume={begun}", "online.rounds=1"])
    assert (begun / "metrics.jsonl").read_bytes() == metrics


def test_a_round_with_nothing_to_learn_from_is_refused_with_the_reason(tmp_path: Path) -> None:
    def why(rows: Sequence[Row], scores: Sequence[Row], counts: dict[str, int], truncated: str = "keep") -> str:
        plan: Any = SimpleNamespace(directory=RunDir(tmp_path), online=SimpleNamespace(truncated=truncated))
        write_sealed(tmp_path / "feedback.jsonl", rows, {}, counts)
        write_sealed(tmp_path / "scores.jsonl", scores, {}, {})
        with pytest.raises(UserError, match="round 0: there is nothing to learn from: ") as refused:
            Round(plan, 0, tmp_path)._train()
        return str(refused.value).partition("from: ")[2].partition(". Its files")[0]

    masked, scored = {"reward": 1.0, "masked": True}, [{"reward": 1.0}, {"reward": 0.0}]
    none_left = "no sample is left (2 samples; 2 were cut, of which online.truncated={} lets nothing be"
    assert why([masked] * 2, scored, {"cut": 2, "rows": 2}, "mask") == f"{none_left} learned)".format("mask")
    assert why([], scored, {"cut": 2, "rows": 0}, "drop") == f"{none_left} learned)".format("drop")
    assert why([], scored, {"rows": 0}) == "the scores of all samples of a prompt are equal, for every prompt (2 samples)"
    verdicts = [{"verdict": "tie"}, {"verdict": None}]
    said = "the judge preferred no sample to another of its prompt (1 ties, 1 answers without a verdict, 2 pairs with an empty"
    assert why([], verdicts, {"compared": 2, "ties": 1, "unparsable": 1, "not_compared": 2}) == f"{said} answer or equal ones)"


def test_samples_without_a_score_are_those_of_training_in_the_metrics_of_training(tmp_path: Path) -> None:
    rollouts = [Rollout(Sample(Prompt(split, (), split), n, "x"), Score(1.0 if n else None, "" if n else "it raised"))
                for split in ("train", "eval") for n in range(3)]  # fmt: skip
    write(tmp_path / "feedback.jsonl", [])
    current = Round(SimpleNamespace(directory=RunDir(tmp_path)), 0, tmp_path)  # type: ignore[arg-type]
    assert current._train_metrics(rollouts)["without_score"] == 1


def test_there_is_no_win_rate_over_answers_that_another_scorer_scored(tmp_path: Path) -> None:
    plan: Any = SimpleNamespace(directory=RunDir(tmp_path), directory_of=lambda number: tmp_path / str(number),
                                online=SimpleNamespace(scorer=SimpleNamespace(name="function")))  # fmt: skip
    row = Rollout(Sample(Prompt("p", (), "eval"), 0, "x"), Score(1.0)).to_row()
    for number, functions in enumerate((["length"], ["length"], ["longer"])):
        write_sealed(tmp_path / str(number) / "scores.jsonl", [row], {"functions": functions, "samples": str(number)}, {})
    assert [len(Round(plan, number, tmp_path / str(number))._first_rollouts()) for number in range(3)] == [1, 1, 0]


# --- what an online run resumes from


@pytest.fixture
def begun(whole: Callable[[str], StartedRun], tmp_path: Path) -> Path:
    """A copy of a run, in another directory, whose last round is trained but not recorded as done."""
    run = Path(shutil.copytree(whole("dpo").run, tmp_path / "elsewhere"))
    note = run / "rounds" / "001" / "round.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "done": False}))
    (run / "result.json").unlink()
    shutil.rmtree(run / "FINAL")
    return run


def resealed(rows: Path) -> None:
    facts = rows.with_name(f"{rows.stem}.meta.json")
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "sha256": hashlib.sha256(rows.read_bytes()).hexdigest()}))


def test_a_moved_run_resumes_with_the_files_it_has(begun: Path, whole: Callable[[str], StartedRun]) -> None:
    shutil.rmtree(begun / "rounds" / "001" / "logs")
    assert train.start([f"resume={begun}"]) == 0
    assert not (begun / "rounds" / "001" / "logs").exists(), "no stage was started"
    assert identity(begun / "FINAL") == identity(whole("dpo").run / "FINAL")
    assert cli.verify(begun) == 0


@pytest.mark.parametrize("name", ["samples", "scores", "feedback"])
def test_a_file_of_a_round_that_was_changed_is_refused_by_name(name: str, begun: Path) -> None:
    rows = begun / "rounds" / "001" / f"{name}.jsonl"
    rows.write_text(rows.read_text().replace("1", "2", 1))
    changed = rf"{name}.jsonl: contents changed: restore the original, or delete \S*rounds/001 to repeat"
    with pytest.raises(UserError, match=changed):
        train.start([f"resume={begun}"])
    resealed(rows)  # a file that is whole, and not the one that the next was made from
    following = {"samples": "scores.jsonl was made from another samples", "scores": "feedback.jsonl was made from another scores",
                 "feedback": r"train was trained on other rows than those of \S*feedback.jsonl"}[name]  # fmt: skip
    with pytest.raises(UserError, match=following):
        train.start([f"resume={begun}"])


def test_samples_of_other_weights_than_the_last_round_left_are_refused(begun: Path) -> None:
    first, second = (begun / "rounds" / number / "train" / "FINAL" / "model.safetensors" for number in ("000", "001"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=r"samples.jsonl was sampled from other weights than those of \S*000/train/FINAL"):
        train.start([f"resume={begun}"])


def test_data_and_models_of_the_rounds_are_compared_by_content(begun: Path) -> None:
    records = RunDir(begun).read_attempts()
    before = yaml.safe_load([*records.values()][-1])
    assert before["content"].keys() >= {"data.train", "data.eval", "model.weights", "model.tokenizer"}
    for key in ("data.train", "model.weights"):
        RunDir(begun).start_attempt({**before, "content": {**before["content"], key: "0" * 64}})
        for word in ("dry_run=true", "dry_run=false"):
            with pytest.raises(UserError, match=rf"{key} .*\(content\)"):
                train.start([f"resume={begun}", word])
    assert train.start([f"resume={begun}", "resume_changes=allow"]) == 0
    assert attempts(begun)[-1]["content_changed"].keys() == {"model.weights tiny (content)"}


def test_a_relative_path_is_resolved_and_valid_from_any_directory(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.build(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Stages, "run", lambda self, command, log: (_ for _ in ()).throw(StoppedError("here")))
    words = ["online.loss=dpo", "model.name_or_path=base", f"output_root={tmp_path}", "exp_name=online", f"cache_dir={cache}"]
    assert train.start([*[word for word in SMALL if word != "model=tiny"], *words]) == 75
    assert f"model.name_or_path='{tmp_path}/base'" in stored_overrides(tmp_path / "online")
    monkeypatch.chdir(cache)
    assert train.start([f"resume={tmp_path / 'online'}"]) == 75


# --- in one process


class Counts(Hook):
    """Remembers how many rounds it has seen."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_eval(self, run: Any, metrics: Any) -> None:
        self.seen.append(metrics["step"])

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def test_hooks_resume_with_the_state_after_the_last_completed_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDir(tmp_path / "online")
    (directory.path / "attempts").mkdir(parents=True)
    directory.write_config("a: 1\n")
    config = SimpleNamespace(
        resume=str(directory.path), exp_name="online", hooks={}, plugins=[], cache_dir="", run_dir=str(tmp_path)
    )
    scorer = SimpleNamespace(name="function")
    online = SimpleNamespace(rounds=4, prompts_per_round=1, eval_prompts=0, keep_rounds=None, scorer=scorer)
    size = SimpleNamespace(prompts=1, steps=1)
    monkeypatch.setattr(rounds.overview, "write", lambda plan: None)
    plan: Any = SimpleNamespace(
        size=size, one_warmup=False, date=None, scorer_date=None,
        config=config, directory=directory, online=online, settings={}, overrides=[], prompts=[1], eval_prompts=[], kind="",
        loss=SimpleNamespace(name="dpo"),
        directory_of=lambda number: directory.path / "rounds" / f"{number:03d}", stages=SimpleNamespace(listen=lambda: None),
    )  # fmt: skip
    dying, hooks = {1, 3}, list[Counts]()

    def run(self: Round) -> RoundResult:
        return RoundResult({"reward": 1.0}, {}, ())

    def close(self: Round, *given: Any) -> None:
        if self.number in dying:  # when its hooks have heard of it
            dying.remove(self.number)
            raise KeyboardInterrupt
        whole(self, *given)

    def trackers(_: Any) -> dict[str, Hook]:
        hooks.append(Counts())
        return {"counts": hooks[-1]}

    whole = Round.close
    monkeypatch.setattr(Round, "run", run)
    monkeypatch.setattr(Round, "close", close)
    monkeypatch.setattr(rounds, "trackers_of", trackers)
    monkeypatch.setattr(rounds.OnlineRun, "_finish", lambda self: None)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            rounds.OnlineRun(plan).run({"overrides": []})
    assert rounds.OnlineRun(plan).run({"overrides": []}) == 0
    assert [each.seen for each in hooks] == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_a_stage_of_code_that_was_edited_since_the_run_began_is_not_started(tmp_path: Path) -> None:
    plan, hashes, ran = object.__new__(OnlinePlan), {"loss._target_": "a", "online.scorer.functions": "b"}, list[Any]()
    plan.directory = RunDir(tmp_path)
    plan.stages = SimpleNamespace(run=lambda command, log: ran.append(command))  # type: ignore[assignment]
    plan.keep_code(lambda: dict(hashes))
    current = Round(plan, 0, tmp_path / "rounds" / "000")
    current._stage("label", ["first"])
    hashes["online.scorer.functions"] = "edited"
    with pytest.raises(UserError, match=r"code of online.scorer.functions was edited after this run began: restore it"):
        current._stage("label", ["second"])
    assert ran == [["first"]]


def test_the_state_of_another_optimizer_is_not_carried_on(begun: Path) -> None:
    plan: Any = object.__new__(OnlinePlan)
    plan.directory, plan.online = RunDir(begun), SimpleNamespace(rounds=2)
    plan.inner = SimpleNamespace(optim={"_target_": "halos.optimizers.standard.adamw"})
    plan._refuse_other_optimizer()
    plan.inner = SimpleNamespace(optim={"_target_": "halos.optimizers.standard.sgd"})
    with pytest.raises(UserError, match=r"the last round was trained with optim._target_=\S*adamw, and \S*sgd cannot"):
        plan._refuse_other_optimizer()


class Clock:
    """time.perf_counter, as far as a test has moved it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_every_second_of_a_round_is_of_sampling_scoring_training_or_of_starting_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage takes 3 s to start, in which it imports and loads, and 2 s lie before it; a start of the run is cut off in the
    second stage."""
    clock, place = Clock(), tmp_path / "rounds" / "000"
    monkeypatch.setattr(spent, "time", SimpleNamespace(perf_counter=clock))
    works, files = {"sample": 40.0, "label": 5.0, "train": 100.5}, {"sample": "samples.meta", "label": "scores.meta"}
    killed = ["label"]

    def run(command: list[str], log: Path) -> None:
        [stage] = command
        clock.now += 3.0
        if stage in killed:
            killed.remove(stage)
            clock.now += 9.0
            raise StoppedError("a signal")
        clock.now += works[stage]
        if stage == "train":
            RunDir(place / "train").path.mkdir()
            RunDir(place / "train").result.write("finished", 4, {}, seconds=works[stage])
        else:
            (place / f"{files[stage]}.json").write_text(json.dumps({"seconds": works[stage]}))

    plan: Any = SimpleNamespace(
        directory=RunDir(tmp_path), refuse_edited_code=lambda: None, stages=SimpleNamespace(run=run),
        online=SimpleNamespace(show=0),
    )  # fmt: skip

    def start() -> tuple[dict[str, float], float]:
        current, began = Round(plan, 0, place), clock.now
        for stage in works:
            if stage not in current.state["seconds"]:
                clock.now += 2.0
                current._stage(stage, [stage])
        clock.now += 1.5  # its results are read
        monkeypatch.setattr(current, "_rollouts", list)
        monkeypatch.setattr(current, "_train_metrics", lambda rollouts: {"reward": 1.0})
        monkeypatch.setattr(current, "_eval_metrics", lambda rollouts: {})
        seconds = {name: value for name, value in current._result().train.items() if name != "reward"}
        return seconds, clock.now - began

    with pytest.raises(StoppedError):
        start()
    assert Round(plan, 0, place).state["seconds"] == {"start": 5.0, "sample": 40.0}, "what is complete is kept"
    seconds, passed = start()
    whole = {"seconds/sample": 40.0, "seconds/score": 5.0, "seconds/train": 100.5, "seconds/start": 5 + 2 * 5 + 1.5}
    assert seconds == whole
    assert sum(seconds.values()) == 45 + passed, "the completed stage of the first start, and all of the second"
    shutil.rmtree(place)
    seconds, passed = start()
    assert (sum(seconds.values()), seconds["seconds/start"]) == (passed, 3 * 5 + 1.5)


def test_a_missing_optimizer_state_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"online.carry_optimizer: .*checkpoints holds no checkpoint"):
        _last_checkpoint(tmp_path)
    for step in (4, 8):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    RunDir(tmp_path).result.write("finished", 8, {})
    assert _last_checkpoint(tmp_path).name == "step-00000008"
    RunDir(tmp_path).result.write("finished", 10, {})
    with pytest.raises(UserError, match=r"checkpoints holds none of its end \(step 10\), but one of step 8 with an optimizer"):
        _last_checkpoint(tmp_path)


@pytest.mark.slow
def test_a_server_that_keeps_the_policy_of_the_round_before_ends_the_run_however_little_that_moved(
    cache: Path, tmp_path: Path
) -> None:
    directory = locate("tiny", None, cache)
    tokenizer, _ = load_tokenizer(directory, add_tokens=[])
    model = load_model(directory, tokenizer, reward=False, dtype=torch.float32, attention="eager")
    with servers_of(model) as start:
        words = ["online.loss=grpo", "online.sampler.name=vllm", f"online.sampler.url={start().url}", "optim.lr=1e-5"]
        started = StartedRun(tmp_path, cache, words)
        process = started.start()
        said, _ = process.communicate(timeout=600)
    assert process.returncode == 2
    served = started.run / "rounds" / "000" / "train" / "FINAL"
    assert "samples from the policy of the round before" in said
    assert f"Serve {served}, and run the same command again" in " ".join(said.split())
