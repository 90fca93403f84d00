"""What the documents tell people to type works: every command on train.py is run dry, in this process.

Models of the hub are stood in for by random ones of the same architecture, a judge's key by a word; nothing else is.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from halos.errors import UserError
from halos.rundir import DRY_RUN
from tests import composed
from tests.losses import cases

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *sorted(path for room in ("config", "halos", "launch") for path in (ROOT / room).rglob("README.md")),
]
TEXT = "\n".join(path.read_text() for path in DOCUMENTS)
KINDS = {"SmolLM2": "Llama", "Llama": "Llama", "Qwen": "Qwen2", "gemma": "Gemma3Text", "Mistral": "Mistral", "pythia": "GPTNeoX"}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 2048,
}  # fmt: skip
PAIRS = [{"prompt": f"Count {n}", "chosen": f"1 2 {n}\n#### {n}", "rejected": f"no {n}"} for n in range(8)]
CHATS = [
    {"messages": [{"role": "user", "content": f"Count {n}"}, {"role": "assistant", "content": f"1 2 {n}"}]} for n in range(8)
]
VOTES = [
    {"question": f"Count {n}", "answers": [{"text": f"1 2 {n}", "votes": n + 1}, {"text": "no", "votes": 0}]} for n in range(8)
]
RANKED = [{"prompt": f"Count {n}", "ranked": [f"1 2 {n}", f"{n}", "no"]} for n in range(8)]
MIXED = [{"prompt": "Write f!", "task": "code", "tests": ["f(1) == 1", "f(2) == 3"]}, {"prompt": "Hello!", "task": "chat"}]
HH = [{name: f"\n\nHuman: Count {n}\n\nAssistant: {name}" for name in ("chosen", "rejected")} for n in range(8)]
BEST = "question,best,worst,lang,score_ratio\n" + "".join(f"Count {n},1 2 {n},no,EN,{n}\n" for n in range(8))
PROMPTS = [{"prompt": f"Count {n}", "solution": str(n)} for n in range(8)]


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]
    return list(dict.fromkeys(lines))  # some stand on the front page and in the manual


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_links_to_is_there(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


def test_the_front_page_is_short_and_leads_to_every_other_document() -> None:
    front = DOCUMENTS[0].read_text()
    assert len(front.splitlines()) <= 150
    assert {str(path.relative_to(ROOT)) for path in DOCUMENTS[1:]} <= set(re.findall(r"\]\(([^)]+)\)", front))


ON_TRAIN = [line for line in commands() if "train.py" in line or ".sbatch" in line]
GOING_ON = [line for line in ON_TRAIN if "resume=" in line]


def words_of(command: str) -> list[str]:
    words = shlex.split(command)
    first = next(n for n, word in enumerate(words) if word == "train.py" or word.endswith(".sbatch"))
    return words[first + 1 :]


def taught(teacher: Path) -> list[dict[str, Any]]:
    """A row with one id of each scored token, of the bundled tokenizer."""
    import transformers

    from halos.data.encoded import Encoded
    from halos.data.formats import read_example
    from halos.data.row import Row
    from halos.data.tokenize import Encoder
    from halos.models import tiny

    tiny.build(teacher)
    row = {"prompt": "Count to two.", "completion": "1 2"}
    encoder = Encoder(transformers.AutoTokenizer.from_pretrained(teacher), max_length=64, truncation="error")
    (encoded,) = encoder.encode([(read_example(Row(row, "a row"), score="last"), "a row")])
    assert isinstance(encoded, Encoded)
    ids = encoded.completions[0].ids.tolist()
    return [{**row, "teacher_ids": [[each] for each in ids], "teacher_logps": [[-0.5]] * len(ids)}]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_model(directory: Path, kind: str, head: str) -> None:
    """A random model with the tokenizer of the bundled one."""
    import transformers

    from halos.models import tiny

    tiny.build(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**SIZES, vocab_size=len(tokenizer), **ids)
    config.num_labels = 1
    (directory / "model.safetensors").unlink()
    getattr(transformers, head).from_config(config).save_pretrained(directory)


OWN = ("myhooks", "mylogs", "mylosses", "myoptim", "myranks", "myrates", "myrewards", "myrows", "mytrainers")  # in the documents


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with what the commands name: data, packages, a reward model, and few bundled problems."""
    place = tmp_path_factory.mktemp("desk")
    rows = {"votes.jsonl": VOTES, "pairs.jsonl": PAIRS, "held_out.jsonl": PAIRS, "chats.parquet": CHATS, "prompts.jsonl": PROMPTS,
            "rankings.jsonl": RANKED, "mixed.jsonl": MIXED}  # fmt: skip
    rows |= dict.fromkeys(("taught/train.jsonl", "taught/eval.jsonl"), taught(place / "teacher"))
    for name in {name for line in ON_TRAIN for name in re.findall(r"[\w/]+\.(?:jsonl|parquet)", line)}:
        write_rows(place / name, rows[name])
    (place / "best.csv").write_text(BEST)
    (place / "chats.log").write_text("".join(f"Count {n}\t1 2 {n}\n" for n in range(8)))
    for name, code in re.findall(r"```python\n# ([\w/]+\.py)\n(.*?)```", TEXT, re.S):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        import datasets
        import huggingface_hub

        from halos.data import arithmetic

        patch.setattr(arithmetic, "NUM_PROBLEMS", {"eval": 12, "train": 64})
        patch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: hub(place, name))
        patch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(HH))
        patch.setenv("OPENAI_API_KEY", "a word")
        patch.setenv("HALOS_CACHE", str(place / "cache"))
        patch.syspath_prepend(str(place))
        yield place
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]


def hub(place: Path, name: str) -> str:
    directory = place / "hub" / name
    if not directory.exists():
        save_model(directory, next(kind for word, kind in KINDS.items() if word in name), "AutoModelForCausalLM")
    return str(directory)


MEASURED: dict[Any, Any] = {}


def of_its_shapes(measure: Callable[..., Any], model: Any, device: Any) -> Any:
    """What `measure` said of a model of these shapes: most commands train the same one."""
    shapes = tuple((name, each.shape, each.dtype, each.requires_grad) for name, each in model.named_parameters())
    key = (type(model), str(model.config), str(model.config._attn_implementation), shapes, device)
    if key not in MEASURED:
        MEASURED[key] = measure(model, device)
    return MEASURED[key]


@pytest.fixture
def dry(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`dry(command)`: its exit status with dry_run=true; what it would leave behind is a page."""
    from halos.inspection import activations
    from train import start

    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(activations, "of", partial(of_its_shapes, activations.of))  # two fifths of a dry run
    monkeypatch.chdir(desk)
    yield lambda command: start([*words_of(command), "dry_run=true"])
    for number, handler in before.items():
        if signal.getsignal(number) is not handler and handler is not None:
            signal.signal(number, handler)


def written(desk: Path) -> list[Path]:
    """The files of runs, without the pages of dry runs."""
    return sorted(path for path in (desk / "runs").rglob("*") if path.is_file() and path.name != DRY_RUN)


@contextmanager
def without_run(desk: Path, command: str) -> Iterator[None]:
    """Without the run that `command` would begin: tests on the same worker have made it, in whatever order."""
    name = next((word.partition("=")[2] for word in words_of(command) if word.startswith("exp_name=")), "none")
    run, aside = desk / "runs" / name, desk / "aside"
    if is_there := run.exists():
        run.rename(aside)
    yield
    if is_there:
        shutil.rmtree(run, ignore_errors=True)
        aside.rename(run)


def is_of_a_loss_like_another(command: str) -> bool:
    """Whether it differs from another line of the losses' table in the name of a loss that is computed as that one."""
    alike = cases.LIKE_DPO | cases.LIKE_GRPO
    return any(words_of(command) == [f"loss={name}", "model=tiny", "data=arithmetic", f"exp_name={name}"] for name in alike)


ALIKE = [line for line in ON_TRAIN if is_of_a_loss_like_another(line)]


@pytest.mark.parametrize("command", ALIKE)
def test_every_command_for_a_loss_like_another_is_accepted(command: str) -> None:
    assert composed.config_of(*words_of(command)).exp_name in cases.LIKE_DPO | cases.LIKE_GRPO


@pytest.mark.parametrize("command", [line for line in ON_TRAIN if line not in (*GOING_ON, *ALIKE)])
def test_every_documented_command_ends_dry(command: str, dry: Callable[..., int], desk: Path) -> None:
    if "=runs/reward/FINAL" in command and not (desk / "runs" / "reward" / "FINAL").exists():
        save_model(desk / "runs" / "reward" / "FINAL", "Llama", "AutoModelForSequenceClassification")
    with without_run(desk, command):
        before = written(desk)
        assert dry(command) == 0
        assert written(desk) == before
        assert list(desk.rglob("runs/**/dry_run.html"))


def test_the_documented_rewards_of_code_and_of_groups_score_as_they_say(desk: Path) -> None:
    from myrewards import code  # type: ignore[import-not-found]

    row, answer = {"data": MIXED[0]}, f"So:\n{code.FENCE}python\ndef f(x): return x\n{code.FENCE}"
    assert [code.passes(text, row) for text in (answer, answer.replace("return x", "return 2 * x - 1"), "no")] == [0.5, 1.0, 0.0]
    assert code.passes(answer, {"data": MIXED[1]}) is None
    assert code.longest(["a", "bb", "bb"], [row] * 3) == [0.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def begun(desk: Path) -> Iterator[None]:
    """The runs that commands go on with, cut short after steps or before the first round."""
    from halos.online.rounds import OnlineRun
    from halos.trainers.base import Trainer
    from train import start

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py"])
        patch.chdir(desk)
        step = Trainer.step

        def cut_short(self: Trainer, indices: Any) -> Any:
            done = step(self, indices)
            last = 40 if self.run.directory.path.name == "long" else 2
            self.run.stop_requested = "SIGTERM" if self.run.step == last else None
            return done

        patch.setattr(Trainer, "step", cut_short)
        patch.setattr(OnlineRun, "run", lambda self, attempt: self._begin(attempt) or 0)
        for name in {name for line in GOING_ON for name in re.findall(r"resume=runs/(\w+)", line)}:
            line = next(line for line in ON_TRAIN if f"exp_name={name}" in line and line not in GOING_ON)
            few = ["train.batch_size=4", "train.eval_at_start=false"] if "loss=online" not in line else []
            assert start([*words_of(line), *few]) in (0, 75)
    yield
    shutil.rmtree(desk / "runs", ignore_errors=True)


@pytest.mark.parametrize("command", GOING_ON)
def test_every_documented_resume_ends_dry(command: str, begun: None, dry: Callable[..., int], desk: Path) -> None:
    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in written(desk)}

    before = state()
    more = " train.batch_size=4 train.eval_at_start=false" if "resume=auto" in command else ""
    assert dry(command + more) == 0
    assert state() == before


@pytest.mark.parametrize(
    "choice", sorted(path.stem for path in (ROOT / "config" / "model").glob("*.yaml") if path.stem != "path")
)
def test_every_bundled_choice_of_a_model_ends_dry(choice: str, dry: Callable[..., int], desk: Path) -> None:
    assert dry(f"train.py loss=dpo peft=lora model={choice} data.train=[pairs.jsonl] data.eval=[] exp_name={choice}") == 0


WRONG = [
    ("loss=dpo peft=lora peft.target_modules=[q_projj]", "Target modules {'q_projj'} not found"),
    ("loss=dpo reference.name_or_path=runs/none", "reference.name_or_path=runs/none"),
    ("loss=dpo peft=lora peft.modules_to_save=[lm_headd]", "modules_to_save"),
    ("loss=online online.loss=grpo data.train=[bare.jsonl] data.eval=[]", "exact_match needs a column `solution`"),
    ("loss=online online.loss=grpo online.steps=2 data.train=[bare.jsonl] data.eval=[]", "exact_match needs a column `solution`"),
    ("loss=online online.loss=grpo online.samples_per_prompt=1", "grpo compares the samples of a prompt"),
    ("loss=online online.loss=grpo online.samples_per_prompt=1 online.steps=2", "grpo compares the samples of a prompt"),
    ("loss=grpo data.train=[single.jsonl] data.eval=[]", "each of the 8 prompts of data.train has one"),
    ("loss=online online.loss=dpo online.sampler.max_new_tokens=600", "no prompt of data.train leaves room"),
    ("loss=online online.loss=unknown", "online.loss=unknown: it is no loss"),
    ("loss=online online.loss=rdpo", "online.loss=rdpo: it is known (arXiv:2403.19159) but not built in"),
    ("loss=online online.loss=reward", "trains a reward model"),
    ("loss=online online.loss=dpo online.scorer.name=reward_model online.scorer.model=runs/none", "online.scorer.model"),
    ("loss=dpo logging=wandb hooks.wandb.mode=online", "hooks.wandb.mode=online needs a key"),
    ("loss=online online.loss=dpo logging=wandb hooks.wandb.mode=online", "hooks.wandb.mode=online needs a key"),
    ("loss=dpo checkpoint.everyy=3", "checkpoint.everyy"),
    ("-m loss=dpo peft=lora peft.modules_to_save=[],[lm_headd]", "(in the job peft.modules_to_save=[lm_headd])"),
]


@pytest.mark.parametrize(("words", "part"), WRONG)
def test_a_dry_run_refuses_what_the_run_would(
    words: str,
    part: str,
    dry: Callable[..., int],
    desk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(desk / "none"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    write_rows(desk / "bare.jsonl", [{"prompt": row["prompt"]} for row in PROMPTS])
    write_rows(desk / "single.jsonl", [{"prompt": f"Say {n}", "completion": str(n), "reward": n / 2} for n in range(8)])
    try:
        status, said = dry(f"train.py model=tiny data=arithmetic {words} exp_name=wrong"), capsys.readouterr().err
    except UserError as error:
        status, said = 2, str(error)
    assert status == 2
    assert part in said


def test_a_dry_resume_names_the_checkpoint_and_refuses_damage(
    begun: None, dry: Callable[..., int], desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry("train.py resume=runs/long") == 0
    assert "would resume from checkpoints/step-00000040" in "".join(capsys.readouterr())
    newest = desk / "runs" / "long" / "checkpoints" / "step-00000040" / "metrics.json"
    text = newest.read_text()
    try:
        newest.write_text("{}")
        with pytest.raises(UserError, match="step-00000040 cannot be resumed from"):
            dry("train.py resume=runs/long/checkpoints/step-00000040")
    finally:
        newest.write_text(text)


@pytest.mark.parametrize(("loss", "why"), [("reward", "it trains a reward model"), ("csft", "it rewrites the rows")])
@pytest.mark.parametrize("way", ["online.rounds=1", "online.steps=2"])
def test_what_a_loss_is_bound_to_decides_whether_its_policy_can_be_sampled_and_not_its_name(
    loss: str, why: str, way: str, dry: Callable[..., int], desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk / "own" / "loss").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / "config" / "loss" / f"{loss}.yaml", desk / "own" / "loss" / "mine.yaml")
    command = f"train.py --config-dir own loss=online online.loss=mine {way} model=tiny data=arithmetic exp_name=own"
    try:
        status, said = dry(command), capsys.readouterr().err
    except UserError as error:
        status, said = 2, str(error)
    assert (status, f"online.loss=mine: {why}" in said) == (2, True)


def refuse(name: str, **_: Any) -> str:
    raise OSError(f"{name} is nowhere")


# --- what reads runs


ON_RUNS = [line for line in commands() if "-m halos." in line]


@pytest.fixture(scope="module")
def left(desk: Path) -> Iterator[None]:
    """What the commands on runs are typed after: runs of a few steps under the names they name, a reward model, a base."""
    from train import start

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py"])
        patch.chdir(desk)
        shutil.rmtree("runs", ignore_errors=True)
        words = ["loss=dpo", "model=tiny", "data.train=[pairs.jsonl]", "data.eval=[pairs.jsonl]", "peft=lora", "train.steps=100",
                 "train.batch_size=1", "exp_name=demo", "train.eval_every=100", "train.prove=off"]  # fmt: skip
        assert start([*words, "checkpoint.every=100"]) == 0
        demo = Path("runs/demo")
        for name in ("dpo", "kto", "sft", "sweep/a", "sweep/b"):
            shutil.copytree(demo, demo.parent / name)
        save_model(Path("runs/reward/FINAL"), "Llama", "AutoModelForSequenceClassification")
        from halos.models.locate import locate

        shutil.copytree(locate("tiny", None, desk / "cache"), "where/the/base/is/now")
    yield
    shutil.rmtree(desk / "runs", ignore_errors=True)


@pytest.mark.parametrize("line", ON_RUNS)
def test_every_documented_command_on_runs_ends_well(
    line: str, left: None, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For real, but for the hub, the judge and the number of tokens; each in what those above it left."""
    from rollout.stub import Stub

    monkeypatch.chdir(desk)
    module, *words = shlex.split(line.partition("-m ")[2])
    pushed: dict[str, Any] = {}
    monkeypatch.setattr("halos.export.hub._push", lambda api, directory, repo, **given: str(pushed.setdefault(repo, given)))
    judge = Stub(trouble=False)
    samples = ["--max-new-tokens", "4", "--overwrite"]
    words += samples if module == "halos.online.sample" else []
    if words[0] == "samples.jsonl" and not Path("samples.jsonl").exists():  # another worker of this run had the line before
        sampled = next(each for each in ON_RUNS if "halos.online.sample" in each)
        importlib.import_module("halos.online.sample").main([*shlex.split(sampled.partition("-m ")[2])[1:], *samples])
    words += ["--url", judge.url] if "--judge" in words else []
    output = next((desk / word for flag, word in itertools.pairwise(words) if flag == "--output"), None)
    if output is not None and output.is_dir():
        shutil.rmtree(output)
    status = importlib.import_module(f"{module}.__main__" if (ROOT / Path(*module.split("."))).is_dir() else module).main(words)
    judge.close()
    assert status == 0, "".join(capsys.readouterr())
    assert output is None or output.exists()
    assert pushed == ({"me/demo": {"private": True, "revision": None}} if "--push-to-hub" in words else {})


def test_every_file_that_a_document_names_exists() -> None:
    readers = set(re.findall(r"```python\n# in (\S+)\n", TEXT))  # files that a reader is shown how to write
    for path in re.findall(r"(?:launch|config|halos|tests)/[\w/.-]+\.(?:py|sh|yaml)", TEXT):
        assert (ROOT / path).exists() or path in readers, path
