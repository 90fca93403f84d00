"""The live loop: a step trains on samples of the policy in that step, under every strategy."""

import gzip
import json
import math
import multiprocessing
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from halos.checkpoint.select import step_of
from halos.config import run_config
from halos.data.tokenize import vocabulary_of
from halos.errors import UserError
from halos.logps import blockwise
from halos.models import tiny
from halos.models.load import load_model, load_tokenizer
from halos.models.locate import locate
from halos.online.live import RolloutSource, usable_feedback
from halos.online.live_rows import LiveBatch, LiveRows
from halos.repository import CONFIG
from halos.rollout import batch_files, feedback
from halos.rollout.prompts import digest, drawn_after, read_prompts
from halos.rollout.types import Prompt, Rollout, Sample, Score
from halos.run import batch_source
from halos.types import Demonstration, Judgement, Scored
from tests.losses import cases
from tests.rollout.vllm_server import VLLMServer, servers_of

Command = Callable[..., subprocess.CompletedProcess[str]]
LIVE = [
    "loss=online", "online.loss=grpo", "online.steps=4", "online.samples_per_prompt=3", "online.eval_prompts=4",
    "online.sampler.max_new_tokens=8", "online.scorer.functions=[{function: length, target: 3}]", "train.batch_size=12",
    "optim.lr=1e-2", "schedule=constant", "checkpoint.every=2", "online.scorer.processes=1",
]  # fmt: skip


def rows(run: Path, split: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["split"] == split]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "FINAL" / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "peft"),
    [
        pytest.param("cpu2", "none", id="DDP", marks=pytest.mark.slow),
        pytest.param("cpu2_fsdp2", "none", id="FSDP2"),
        pytest.param("cpu2_fsdp2", "lora", id="FSDP2, LoRA", marks=pytest.mark.slow),
    ],
)
def test_sampled_log_probs_are_the_recomputed_ones_on_every_strategy(
    config: str, peft: str, command: Command, tmp_path: Path
) -> None:
    common = [*LIVE, f"peft={peft}"]
    command(*common, "exp_name=alone")
    command(*common, "exp_name=two", launch=2, config=config)
    alone, two = rows(tmp_path / "alone", "train"), rows(tmp_path / "two", "train")
    assert len(alone) == len(two) == 4
    for row in (*alone, *two):
        assert row["mismatch/max"] < 1e-4
        assert row["approx_kl"] == row["clip_fraction"] == 0.0, "whatever the sampler computed"
        assert row["entropy"] > 0.5, "not gibberish of one token"
    assert two[0]["reward"] == pytest.approx(alone[0]["reward"], rel=1e-6), "the same requests, the same texts"
    assert two[0]["loss"] == pytest.approx(alone[0]["loss"], abs=1e-5)
    evals = [rows(tmp_path / name, "eval") for name in ("alone", "two")]
    assert evals[0][0]["reward"] == pytest.approx(evals[1][0]["reward"], rel=1e-6)
    assert alone[-1]["reward"] != alone[0]["reward"]


@pytest.mark.slow
def test_the_sampler_of_a_sharded_policy_rounds_the_layers_as_training_does(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 all-gathers layers in bfloat16, weights of norms included, which autocast leaves in float32: 1e-2 apart, and so are
    two kernels of attention."""
    (tmp_path / "one_kernel.py").write_text(
        "from halos.hooks.base import Hook\nfrom halos.logps import blockwise\nblockwise.takes = lambda *of: False\n"
        "class Imported(Hook):\n    pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = [*LIVE, "data.eval=[]", "online.steps=2", "online.sampler.max_new_tokens=16", "train.precision=bfloat16",
             "plugins=[one_kernel]", "+hooks.one_kernel={_target_: one_kernel.Imported}"]  # fmt: skip
    command(*words, "online.scorer.functions=[{function: length, target: 12}]", "exp_name=two", launch=2, config="cpu2_fsdp2")
    for row in rows(tmp_path / "two", "train"):
        assert 0 < row["mismatch/mean"] < 3e-3


def test_the_sampler_computes_in_the_precision_of_training(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the sampler's log-probs would be 1e-2 from bfloat16's, and so they are by another kernel of attention."""
    monkeypatch.setattr(blockwise, "takes", lambda *of: False)
    words = [*SMALL, *LIVE, "online.steps=2", "online.sampler.max_new_tokens=16", "data.eval=[]", "train.precision=bfloat16"]
    assert train.start([*words, f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]) == 0
    for row in rows(tmp_path / "run", "train"):
        assert 0 < row["mismatch/mean"] < 3e-3
        assert row["mismatch/ess"] > 0.999


@pytest.mark.parametrize(("loss", "of_training"), [("grpo", 0.7), ("dpo", 1.0)])
def test_the_samplers_temperature_is_that_of_a_policy_gradients_log_probs_alone(
    loss: str, of_training: float, cache: Path, tmp_path: Path
) -> None:
    words = [*SMALL, *LIVE, f"online.loss={loss}", "online.steps=1", "online.sampler.temperature=0.7", "data.eval=[]"]
    assert train.start([*words, f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]) == 0
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (settings["train"]["temperature"], settings["train"]["steps"]) == (of_training, 1)


def test_without_a_number_of_new_tokens_samples_go_on_to_the_end_of_max_length(cache: Path, tmp_path: Path) -> None:
    words = [*SMALL, *LIVE, "online.steps=1", "online.sampler.max_new_tokens=null", "data.eval=[]", "train.max_length=40"]
    shared = [f"cache_dir={cache}", f"output_root={tmp_path}"]
    assert train.start([*words, *shared, "exp_name=run", "online.loss=dr_grpo", "checkpoint.every=1", "online.epochs=2"]) == 0
    batch = LiveRows(Scored, sampled_here=True, minibatches=1, epochs=2, seed=0)
    batch.load(tmp_path / "run" / "checkpoints" / "step-00000001" / "batch")
    lengths = batch.lengths[:, 0]
    assert lengths.max() == 40, "an untrained model seldom ends its answer"
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["loss"]["max_tokens"] == 40
    with pytest.raises(UserError, match=r"no prompt leaves room for an answer within 8 tokens \(train.max_length\)"):
        train.start([*words, *shared, "exp_name=no", "train.max_length=8"])


def test_samples_that_were_cut_are_masked_or_dropped_and_counted(cache: Path, tmp_path: Path) -> None:
    words = [*SMALL, *LIVE, "online.steps=1", "data.eval=[]", f"cache_dir={cache}", f"output_root={tmp_path}"]
    longer = [
        *words,
        "online.sampler.max_new_tokens=150",
        "online.epochs=2",
        "checkpoint.every=1",
    ]  # an untrained model ends about half of its answers by then
    for name in ("mask", "drop"):
        assert train.start([*longer, f"online.truncated={name}", f"exp_name={name}"]) == 0
        row = rows(tmp_path / name, "train")[0]
        assert 0.1 < row["samples/cut"] < 0.9
        batch = LiveRows(Scored, sampled_here=True, minibatches=1, epochs=2, seed=0)
        batch.load(tmp_path / name / "checkpoints" / "step-00000001" / "batch")
        lengths = batch.lengths[:, 0] - [len(item.prompt) for item in batch.items]
        scored = batch.scored[:, 0]
        assert (scored == (lengths * (lengths < 150) if name == "mask" else lengths)).all()
        assert (lengths.max() == 150) == (name == "mask"), "dropped ones are not there"
    with pytest.raises(UserError, match=r"120 samples none was better .*; 120 were cut, of which online.truncated=mask lets"):
        train.start([*words, "online.truncated=mask", "exp_name=no", "online.sampler.max_new_tokens=2"])


def test_the_policy_moves_between_samples_and_a_killed_run_resumes_exactly(command: Command, tmp_path: Path) -> None:
    command(*LIVE, "exp_name=whole")
    command(*LIVE, "exp_name=cut")
    # back to the checkpoint of step 2, as a run that died after it would go on
    command(f"resume={tmp_path / 'cut' / 'checkpoints' / 'step-00000002'}")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)
    plain = [[{name: value for name, value in row.items() if "second" not in name and "memory" not in name}
              for row in rows(tmp_path / name, "train")] for name in ("whole", "cut")]  # fmt: skip
    assert plain[0] == plain[1]
    assert (tmp_path / "whole" / "samples.md").is_file()


PASSES = ["online.minibatches=2", "online.epochs=2", "online.steps=3", "train.batch_size=6", "checkpoint.every=1",
          "checkpoint.keep_last=20"]  # fmt: skip
OF_PASSES = {  # a loss whose values, advantages and adaptive coefficient are of a batch; one whose groups are; one on pairs
    "ppo": ["online.loss=ppo", "peft=lora", "online.overrides=[loss.kl_target=0.1,loss.kl_horizon=10]"],
    "grpo": ["online.loss=grpo", "online.feedback.drop_equal=true"],
    "dpo": ["online.loss=dpo", "train.batch_size=2"],
    "kto": ["online.loss=kto"],
}


@pytest.mark.parametrize(("name", "killed"), [("ppo", (5, 8)), ("grpo", (6,)), ("dpo", (7,)), ("kto", (6,))])
def test_a_run_killed_within_a_batch_ends_with_the_weights_of_an_uninterrupted_one(
    name: str, killed: tuple[int, ...], cache: Path, tmp_path: Path
) -> None:
    words = [*SMALL, *LIVE, *PASSES, *OF_PASSES[name], "data.eval=[]", f"cache_dir={cache}", f"output_root={tmp_path}"]
    assert train.start([*words, "exp_name=whole"]) == 0
    saves = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert {step_of(path): (path / "batch").is_dir() for path in saves} == {step: step % 4 != 0 for step in range(1, 13)}
    rollouts = sorted((tmp_path / "whole" / "rollouts").iterdir())
    assert [path.name for path in rollouts] == ["000000.jsonl.gz", "000001.jsonl.gz", "000002.jsonl.gz"]
    records = [json.loads(line) for line in gzip.decompress(rollouts[0].read_bytes()).splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole" / "FINAL")
    assert {row["vocabulary"] for row in records if row.get("output_ids")} == {vocabulary_of(tokenizer)}, (
        "a data set of them has ids"
    )
    for step in killed:
        shutil.copytree(tmp_path / "whole", tmp_path / f"cut{step}")
        shutil.copy(rollouts[-1], tmp_path / f"cut{step}" / "rollouts" / "000009.jsonl.gz")  # of an attempt that came further
        # as the run was when it died after that step
        assert train.start([f"resume={tmp_path / f'cut{step}' / 'checkpoints' / f'step-{step:08d}'}"]) == 0
        one, other = (load_file(tmp_path / run / "FINAL" / "model.safetensors") for run in ("whole", f"cut{step}"))
        assert all(torch.equal(one[key], other[key]) for key in one), step
        again = {path.name: path.read_bytes() for path in (tmp_path / f"cut{step}" / "rollouts").iterdir()}
        assert again == {path.name: path.read_bytes() for path in rollouts}, "the same bytes, and nothing of what came later"
        same = [[{key: value for key, value in row.items() if "second" not in key and "memory" not in key}
                 for row in rows(tmp_path / run, "train")] for run in ("whole", f"cut{step}")]  # fmt: skip
        assert same[0] == same[1]


@pytest.mark.parametrize(
    ("step", "changed", "sampled"),
    [
        (5, ["online.epochs=1"], [1, 5, 6, 7]),
        pytest.param(4, ["online.epochs=3", "online.minibatches=1"], [1, 5, 7, 10], marks=pytest.mark.slow),
    ],
)
def test_other_passes_that_a_resume_allows_go_on_with_a_batch_of_their_own(
    step: int, changed: list[str], sampled: list[int], cache: Path, tmp_path: Path
) -> None:
    """The checkpoint of step 4 has no batch, and that of step 5 has the second, where 5 is within the third of 2 passes."""
    words = [*SMALL, *LIVE, *PASSES, "data.eval=[]", f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]
    assert train.start([*words, "online.steps=2"]) == 0
    saved = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
    assert train.start([f"resume={saved}", *changed, "online.steps=4", "resume_changes=allow"]) == 0
    assert [row["step"] for row in rows(tmp_path / "run", "train") if "samples/reward" in row] == sampled


def test_minibatches_and_epochs_are_optimizer_steps_on_one_set_of_samples(cache: Path, tmp_path: Path) -> None:
    words = [*SMALL, *LIVE, *PASSES, *OF_PASSES["ppo"], "data.eval=[]", f"cache_dir={cache}", f"output_root={tmp_path}"]
    assert train.start([*words, "exp_name=run", "online.steps=2"]) == 0
    steps = rows(tmp_path / "run", "train")
    assert [row["step"] for row in steps] == list(range(1, 9)), "2 batches of 2 minibatches in 2 epochs"
    assert [("samples/reward" in row, "groups/all_equal" in row) for row in steps] == 2 * [(True, True), *3 * [(False, False)]]
    assert [row["approx_kl"] == 0 for row in steps] == 2 * [True, False, False, False], "the first pass alone is on the policy"
    assert all(row["old/drift"] < 1e-5 for row in steps if "old/drift" in row)
    for row in steps:
        parts = {key: value for key, value in row.items() if key.startswith("seconds/")}
        assert parts.keys() == {"seconds/sample", "seconds/score", "seconds/train"}
        assert sum(parts.values()) == pytest.approx(row["seconds"], abs=2e-4)
    assert [row["seconds/sample"] > 0 for row in steps] == 2 * [True, False, False, False], "what the step itself has sampled"
    assert (tmp_path / "run" / "train.log").read_text().count("4 optimizer steps on each batch") == 1


OF_PAIRS = ("dpo", "cdpo", "ipo", "simpo", "slic")
NOT_LIVE = {"csft": "it rewrites the rows that it trains on", "reward": "it trains a reward model",
            "prm": "it trains a reward model", "online": "is an online run",
            "gkd": "samples have no teacher", "mixture": "loss.parts takes a mapping of losses"}  # fmt: skip


@pytest.mark.parametrize(
    "loss",  # those of OF_PASSES are killed and resumed above
    cases.marked(sorted(path.stem for path in (CONFIG / "loss").glob("*.yaml")), also=OF_PASSES),
)
def test_every_loss_learns_live_or_is_refused_with_the_reason(loss: str, cache: Path, tmp_path: Path) -> None:
    words = [*SMALL, *LIVE, f"online.loss={loss}", "online.steps=2", "data.eval=[]", "checkpoint.every=null", "train.prove=off"]
    words += ["train.batch_size=4"] if loss in OF_PAIRS else []
    command = [*words, f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]
    if loss in NOT_LIVE:
        with pytest.raises(UserError, match=NOT_LIVE[loss]):
            train.start(command)
        return
    assert train.start(command) == 0
    steps = rows(tmp_path / "run", "train")
    assert [row["step"] for row in steps] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 1e-4 and row["skipped_steps"] == 0 for row in steps)
    assert steps[0]["samples/reward"] != steps[1]["samples/reward"], "of other prompts, and of another policy"


def test_a_batch_whose_answers_are_all_wrong_and_so_all_desirable_is_warned_of_once(cache: Path, tmp_path: Path) -> None:
    words = [*SMALL, *LIVE, "online.loss=kto", "online.steps=2", "train.batch_size=6", "data.eval=[]",
             "online.scorer.functions=[exact_match]"]  # fmt: skip
    assert train.start([*words, f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]) == 0
    said = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "labelled desirable" in line]
    assert len(said) == 1
    assert "step 0: all 6 samples are labelled desirable, since none has a score below their mean, right or wrong" in said[0]


def test_kto_live_estimates_the_kl_on_answers_to_other_prompts_of_the_batch(cache: Path, tmp_path: Path) -> None:
    words = [*SMALL, *LIVE, "online.loss=kto", "online.minibatches=2", "online.steps=1", "train.batch_size=6", "data.eval=[]",
             "checkpoint.every=1", "online.overrides=[loss.beta=0.5,loss.desirable_weight=1.5]"]  # fmt: skip
    assert train.start([*words, f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]) == 0
    first, second = rows(tmp_path / "run", "train")
    saved = tmp_path / "run" / "checkpoints" / "step-00000001"
    live = LiveRows(Judgement, sampled_here=True, minibatches=2, epochs=1, seed=0)
    live.load(saved / "batch")
    assert len(live) == 12
    desirable = live.labels["desirable"] > 0
    assert all(live.groups[live.partners] != live.groups), "the answers are to other prompts"
    assert len(set(live.partners)) > 4, "not one answer for all"
    some = live.minibatch(0)
    weights = np.where(desirable[some], 1.5, 1.0)
    assert first["loss"] == pytest.approx(weights.mean() / 2, rel=1e-6), "the policy is the reference: every value is 1 / 2"
    assert (first["kl"], first["z0"]) == (0, 0)

    tiny.build(tmp_path / "base")
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (saved / "model", tmp_path / "base"))

    def log_ratio(row: int, answer: int) -> float:
        prompt, ids = live[row].prompt, live[answer].completions[0].ids
        whole = torch.tensor(np.concatenate([prompt, ids]), dtype=torch.long)[None]
        with torch.no_grad():
            one, other = (model(whole).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for model in (policy, reference))
        return float((one - other).gather(-1, whole[0, len(prompt) :, None]).sum())

    some = live.minibatch(1)
    divergence = np.mean([log_ratio(row, live.partners[row]) for row in some])
    assert second["kl"] == pytest.approx(divergence, abs=1e-4)
    assert abs(divergence) > 0.01
    z0, ratios = max(0.0, divergence), np.array([log_ratio(row, row) for row in some])
    sign = np.where(desirable[some], 1, -1)
    values = np.where(desirable[some], 1.5, 1.0) * (1 - 1 / (1 + np.exp(-0.5 * sign * (ratios - z0))))
    assert second["loss"] == pytest.approx(values.mean(), abs=1e-4)


@pytest.fixture
def serve(cache: Path) -> Iterator[Callable[..., VLLMServer]]:
    """`serve(processed=False, ...)`: a server of that behaviour over the tiny model, which runs until the test ends."""
    place = locate("tiny", None, cache)
    tokenizer, _ = load_tokenizer(place, add_tokens=[])
    model = load_model(place, tokenizer, reward=False, dtype=torch.float32, attention="eager")
    with servers_of(model) as start:
        yield start


def test_a_live_loop_hands_its_weights_to_a_server_before_it_samples(
    serve: Callable[..., VLLMServer], cache: Path, tmp_path: Path
) -> None:
    server = serve()
    words = ["peft=lora", "online.steps=2", "online.sampler.name=vllm", f"online.sampler.url={server.url}", "exp_name=run"]
    assert train.start([*SMALL, *LIVE, *words, f"cache_dir={cache}", f"output_root={tmp_path}"]) == 0
    for row in rows(tmp_path / "run", "train"):
        assert 0 < row["mismatch/max"] < 1e-4, "the server samples from the weights that it was given"
    served = tmp_path / "run" / "served" / "model"
    assert server.loaded == [str(served)] * 4, "for the samples of steps 0 and 1, and for the first and the last evaluation"
    mine, final = load_file(served / "model.safetensors"), weights(tmp_path / "run")
    assert mine.keys() == final.keys()
    assert all(torch.equal(mine[name], final[name]) for name in final), "what was served last is what was saved, merged"
    with pytest.raises(UserError, match=r"online\.sampler\.url"):  # where keys are sent is typed again
        train.start([f"resume={tmp_path / 'run'}", "train.steps=4"])


@pytest.mark.slow
def test_a_server_that_restarted_after_an_evaluation_gets_the_weights_again(
    serve: Callable[..., VLLMServer], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, evaluate = serve(), RolloutSource.evaluate

    def then_restart(source: RolloutSource) -> dict[str, float]:
        metrics = evaluate(source)
        server._set(server.base)
        return metrics

    monkeypatch.setattr(RolloutSource, "evaluate", then_restart)
    words = ["online.steps=3", "train.eval_every=1", "optim.lr=1e-2", "schedule=constant", "online.sampler.name=vllm",
             f"online.sampler.url={server.url}"]  # fmt: skip
    assert train.start([*SMALL, *LIVE, *words, "exp_name=run", f"cache_dir={cache}", f"output_root={tmp_path}"]) == 0
    assert [row["mismatch/max"] < 1e-4 for row in rows(tmp_path / "run", "train")] == [True] * 3


def test_no_prompt_of_a_loop_is_sampled_again_before_all_were(cache: Path, tmp_path: Path) -> None:
    words = ["online.steps=3", "online.feedback.drop_equal=true", "online.samples_per_prompt=2", "data.eval=[]", "exp_name=run",
             "data.train=[{path: arithmetic, split: 'train[:400]'}]"]  # fmt: skip
    assert train.start([*SMALL, *LIVE, *words, f"cache_dir={cache}", f"output_root={tmp_path}"]) == 0
    files = batch_files.files_of(tmp_path / "run").values()
    drawn = [[row["prompt_id"] for row in batch_files.read(path, within=tmp_path)][::2] for path in files]
    assert all(map(len, drawn))
    assert len([*chain(*drawn)]) == len({*chain(*drawn)}) > 3 * 6, "some of the batches were refilled"


def test_a_loop_that_began_before_prompts_were_counted_takes_them_as_it_began(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, *LIVE, "online.feedback.drop_equal=true", "online.samples_per_prompt=2", "data.eval=[]", "exp_name=run"]
    with monkeypatch.context() as patched:
        patched.setattr(LiveBatch, "state_dict", lambda self: {})  # as an older version saved it
        assert train.start([*words, f"cache_dir={cache}", f"output_root={tmp_path}"]) == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    assert train.start([f"resume={checkpoints / 'step-00000002'}"]) == 0
    progress = json.loads((checkpoints / "step-00000004" / "state" / "progress.json").read_text())
    assert progress["hooks"]["live_batch"] == {"drawn": None}
    prompts = read_prompts([{"path": "arithmetic", "split": "train[:48]"}], "train")
    rollouts = batch_files.read(batch_files.files_of(tmp_path / "run")[2], within=tmp_path)
    first = [row["prompt_id"] for row in rollouts][: 2 * 6 : 2]
    assert first == [each.id for each in drawn_after(prompts, 2 * 6, count=6, samples=2, seed=0)]


def test_a_refilled_batch_has_every_prompt_once(cache: Path, tmp_path: Path) -> None:
    words = ["online.steps=4", "online.feedback.drop_equal=true", "online.samples_per_prompt=2", "exp_name=run",
             "data.train=[{path: arithmetic, split: 'train[:5]'}]"]  # fmt: skip
    assert train.start([*SMALL, *LIVE, *words, f"cache_dir={cache}", f"output_root={tmp_path}"]) == 0
    files = batch_files.files_of(tmp_path / "run").values()
    assert len(files) == 4
    for path in files:
        keys = [Rollout.from_row(row, str(path)).sample.key for row in batch_files.read(path, within=tmp_path)]
        assert len(keys) == len({*keys})


@pytest.mark.slow
def test_kto_live_is_the_same_on_two_processes(command: Command, tmp_path: Path) -> None:
    words = [*LIVE, "online.loss=kto", "online.minibatches=2", "online.steps=2", "train.batch_size=6", "data.eval=[]"]
    command(*words, "exp_name=alone")
    command(*words, "exp_name=two", launch=2, config="cpu2")
    alone, two = rows(tmp_path / "alone", "train"), rows(tmp_path / "two", "train")
    assert len(alone) == len(two) == 4
    for one, other in zip(alone, two, strict=True):
        assert (other["loss"], other["kl"]) == pytest.approx((one["loss"], one["kl"]), abs=1e-4)
    assert abs(alone[-1]["kl"]) > 0.01


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ({"processed": False}, "returns log-probs before temperature"),
        ({"reloads": False}, "takes new weights without an error and goes on to sample from earlier ones"),
    ],
    ids=["raw", "stale"],
)
def test_a_server_that_does_not_sample_from_the_policy_ends_a_live_loop(
    behaviour: dict[str, Any], said: str, serve: Callable[..., VLLMServer], cache: Path, tmp_path: Path
) -> None:
    server = serve(**behaviour)
    words = ["online.steps=3", "online.sampler.name=vllm", f"online.sampler.url={server.url}", "data.eval=[]", "exp_name=run"]
    with pytest.raises(UserError, match=said):
        train.start([*SMALL, *LIVE, *words, f"cache_dir={cache}", f"output_root={tmp_path}"])


def test_samples_of_losses_on_pairs_are_rescored_too(serve: Callable[..., VLLMServer], cache: Path, tmp_path: Path) -> None:
    """At the sampler's temperature, which is not the loss's."""
    server = serve()
    engines: dict[str, list[str]] = {
        "hf": ["peft=lora"],
        "vllm": ["online.sampler.name=vllm", f"online.sampler.url={server.url}"],
    }
    for name, engine in engines.items():
        words = ["online.loss=dpo", "online.steps=2", "train.batch_size=4", "online.sampler.temperature=0.5", "data.eval=[]"]
        shared = [f"cache_dir={cache}", f"output_root={tmp_path}", f"exp_name={name}"]
        assert train.start([*SMALL, *LIVE, *words, *engine, *shared]) == 0
        for row in rows(tmp_path / name, "train"):
            assert 0 < row["mismatch/mean"] <= row["mismatch/max"] < 1e-4
        assert "more than rounding" not in (tmp_path / name / "train.log").read_text()


def test_a_loss_on_demonstrations_learns_from_desirable_samples_only() -> None:
    sample = Sample(Prompt("p", ({"role": "user", "content": "?"},)), 0, "so")
    labels = [feedback.Label(Rollout(sample, Score(value)), value > 0, 0.5) for value in (0.0, 1.0)]
    assert usable_feedback(labels, Demonstration) == labels[1:]
    assert usable_feedback(labels, Judgement) == labels


def test_samples_without_a_score_are_counted_and_where_none_has_one_the_reason_ends_the_run(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "oddrewards.py").write_text(
        "def odd(completion, row):\n    if len(completion) % 2: raise ValueError('odd')\n    return float(len(completion))\n"
        "def none(completion, row): return float('nan')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def start(name: str, *words: str) -> int:
        own = [f"online.scorer.functions=[oddrewards.{name}]", "plugins=[oddrewards]", f"exp_name={name}"]
        shared = [*SMALL, "data.eval=[]", f"cache_dir={cache}", f"output_root={tmp_path}"]
        return train.start([*shared, *LIVE, "online.steps=2", "online.scorer.processes=1", *own, *words])

    before = multiprocessing.active_children()
    assert start("odd") == 0
    lacking = [row["samples/without_score"] for row in rows(tmp_path / "odd", "train")]
    assert all(0 < part < 1 for part in lacking)
    for row in rows(tmp_path / "odd", "train"):
        assert row["samples/kept"] + row["samples/without_score"] == pytest.approx(1)
        assert 10 <= row["examples"] / row["step"] <= 14, "4 prompts' worth, of 3 samples each, though half have no score"
    text = (tmp_path / "odd" / "train.log").read_text()
    [line] = [line for line in text.splitlines() if "have no score" in line]
    assert re.search(r"step 0: (\d+) of 12 samples have no score: \1 x oddrewards.odd raised ValueError \(the first", line)
    with pytest.raises(UserError, match=r"step 0: none of 120 samples has a score: 120 x oddrewards.none returned no finite"):
        start("none", "online.feedback.drop_equal=true")
    assert multiprocessing.active_children() == before, "processes that call reward functions end with their run, however it ends"


@pytest.mark.parametrize("fails", ["in training", "in the last evaluation"])
def test_a_checkpoint_is_saved_where_what_scores_the_samples_fails_and_its_resume_is_exact(
    fails: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"rewards_failing_{fails.replace(' ', '_')}"
    (tmp_path / f"{module}.py").write_text(
        "from pathlib import Path\nup, place = True, Path(__file__).parent\n"
        "def of(completion, row):\n"
        "    calls = place / 'calls'\n"
        "    calls.write_text(f'{int(calls.read_text()) + 1}')\n"
        "    if int(calls.read_text()) > int((place / 'most').read_text()): raise ConnectionError('down')\n"
        "    return float(len(completion))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    held_out = "data.eval=[]" if fails == "in training" else "online.eval_prompts=2"
    words = [*SMALL, *LIVE, "online.steps=2", held_out, "train.eval_at_start=false", "train.eval_every=null",
             f"cache_dir={cache}", f"online.scorer.functions=[{module}.of]", f"plugins=[{module}]",
             "checkpoint.every=null", "checkpoint.async_save=true", f"output_root={tmp_path}"]  # fmt: skip
    (tmp_path / "calls").write_text("0")
    (tmp_path / "most").write_text("13" if fails == "in training" else "25")  # one is a trial at the start
    with pytest.raises(UserError, match=r"none of \d+ samples has a score: .* ConnectionError"):
        train.start([*words, "exp_name=cut"])
    [saved] = (tmp_path / "cut" / "checkpoints").iterdir()
    assert saved.name == ("step-00000001" if fails == "in training" else "step-00000002")
    (tmp_path / "most").write_text("1000000")
    assert train.start([f"resume={tmp_path / 'cut'}", f"plugins=[{module}]"]) == 0
    if fails == "in training":
        assert train.start([*words, "exp_name=whole"]) == 0
        whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
        assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def without_later_keys(config: Any) -> dict[str, Any]:
    settings = asdict(config)
    del settings["online"]["keep_rollouts"], settings["online"]["scorer"]["aggregation"]
    return settings


def test_a_live_loop_that_an_earlier_version_began_is_as_long_and_as_hot_as_its_own_keys_say(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, *LIVE, "online.steps=2", "schedule.warmup=0", "train.eval_at_start=false", "train.prove=off"]
    run = tmp_path / "run"
    with monkeypatch.context() as earlier:  # which knew neither columns of the data nor these keys
        earlier.setattr(batch_source, "content_hashes", lambda train, evaluation, scorer: {
            "data.train": digest(train), "data.eval": digest(evaluation)})  # fmt: skip
        earlier.setattr(run_config, "asdict", without_later_keys)
        assert train.start([*words, f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]) == 0
    assert train.start([f"resume={run}", "online.steps=3"]) == 0
    record = yaml.safe_load((run / "attempts" / "001.yaml").read_text())
    assert "content_changed" not in record
    assert record["content"]["data.train.columns"] is not None
    assert [row["step"] for row in rows(run, "train")][-1] == 3
    hotter = [f"resume={run}", "online.steps=4", "online.sampler.temperature=0.5", "resume_changes=allow"]
    assert train.start(hotter) == 0
    assert rows(run, "train")[-1]["approx_kl"] < 5e-9, "the samples are recomputed at the temperature that sampled them"
    with pytest.raises(UserError, match=r"online.steps=6 gives 6 steps .*, and not train.steps=5"):
        train.start([f"resume={run}", "online.steps=6", "train.steps=5"])


def test_several_answers_are_sampled_with_the_same_random_numbers_at_every_evaluation(tmp_path: Path, cache: Path) -> None:
    words = [*SMALL, *LIVE, "online.eval_samples=3", "online.eval_temperature=0.7", "online.steps=2", "train.eval_every=1",
             "train.eval_at_start=true", "optim.lr=1e-12", "online.pass_reward=-1.5", "objective.metric=pass@3",
             f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]  # fmt: skip
    assert train.start(words) == 0
    first, *others = [{key: value for key, value in row.items() if key != "step" and "seconds" not in key}
                      for row in rows(tmp_path / "run", "eval")]  # fmt: skip
    assert others == [first, first], "the policy has not moved, and the random numbers are the same"
    assert (first["samples"], first["avg@3"]) == (12, first["reward"])
    assert 0 <= first["pass@1"] <= first["pass@3"] <= first["pass@3/ci_high"] <= 1
    assert first["reward/ci_low"] < first["reward"] < first["reward/ci_high"]
    assert first["reward/std"] > 0, "the answers differ"
    text = (tmp_path / "run" / "train.log").read_text()
    assert "4 held out, 3 answers of each at temperature 0.7; from the reward -1.5 on an answer passes" in text
    assert f"pass@3 {first['pass@3']:.4g} ({first['pass@3/ci_low']:.3g} to" in text
    assert f"held out: reward {first['reward']:.4g} (" in (tmp_path / "run" / "samples.md").read_text()


def test_what_cannot_run_live_is_refused(tmp_path: Path, cache: Path) -> None:
    for words, said in (
        (["online.loss=kto", "train.batch_size=4"], "a batch has one prompt: train.batch_size=6 or more"),
        (["train.batch_size=2"], "cannot hold the 3 samples"),
        (["online.rounds=2"], "exclude each other"),
        (["train.steps=9"], "online.steps=4 and train.steps=9 are one number in a live loop: leave out train.steps"),
        (["online.feedback.threshold=1"], "online.feedback.threshold has no effect on scalar feedback, which takes online"),
        (["online.feedback.kind=pairwise"], "online.feedback.kind=pairwise: a live loop of grpo learns from scalar feedback"),
        (["online.sampler.name=openai", "online.sampler.url=http://x/v1"], "a live loop samples with"),
        (["online.sampler.max_new_tokens=512"], "no prompt leaves room"),
        (["online.eval_samples=4"], "online.eval_samples=4 with online.eval_temperature=0 is the same answer 4 times"),
        (["online.pass_reward=1"], "online.pass_reward is of pass@k, which takes several answers"),
        (["online.eval_temperature=0.7", "data.eval=[]"], "and there are none (data.eval=[]): leave it out"),
        (["online.eval_samples=4", "online.eval_temperature=1", "objective.metric=pass@8"], "did you mean pass@"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            train.start([*SMALL, f"cache_dir={cache}", f"output_root={tmp_path}", *LIVE, *words, "exp_name=no"])
