"""Run directories from an attacker: one message each, nothing outside is touched, no code runs, nothing hangs."""

import json
import os
import pickle
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import compose

import train
from halos.checkpoint import __main__ as cli
from halos.checkpoint import lineage, manifest, select, state
from halos.cli import resume, single
from halos.errors import UserError
from halos.models.locate import locate
from halos.report.read import read_runs
from halos.run.lifecycle import run as begin
from halos.rundir import RunDir

SECRET = "a secret\n"
PATIENCE = 120  # seconds; what hangs, hangs for ever
STEP = "checkpoints/step-00000002"
FEW = ["loss=sft", "peft=lora", "train.batch_size=8", "train.steps=4", "checkpoint.every=2", "train.eval_every=null"]
Plant = Callable[[Path, Path], object]  # into a run, given a file outside that nobody may read or change


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run with LoRA that was stopped after step 2, with its base within it."""
    config = compose(cache, tmp_path_factory.mktemp("runs"), *FEW)
    assert begin(config, []) == 0
    run = Path(config.run_dir)
    shutil.rmtree(run / "FINAL")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "commits.jsonl").unlink(missing_ok=True)
    return run


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """The canary. It is as it was, and alone, whatever a command made of the run; and nothing of it was read into the run."""
    path = tmp_path / "outside" / "canary"
    path.parent.mkdir()
    path.write_text(SECRET)
    os.utime(path, (10**9, 10**9))
    yield path
    assert (path.read_text(), path.stat().st_mtime, os.listdir(path.parent)) == (SECRET, 10**9, ["canary"])
    assert not (tmp_path / "pwned").exists()


@contextmanager
def in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def told(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit status and words of a command of train.py or, with `checkpoint` first, of halos.checkpoint."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # a user who answers yes to whatever is asked
    capsys.readouterr()
    with in_time():
        if words[0] == "checkpoint":
            monkeypatch.setattr(sys, "argv", words)
            status = cli.main()
            said = capsys.readouterr()
            return status, said.out + said.err
        try:
            status = train.start(words)
        except UserError as error:
            return 2, str(error)
    return status, capsys.readouterr().err


# --- links, pipes and second names: refused before anything is read ------------------------------------------------------


def linked(name: str, *, to: str = "canary") -> Plant:
    """`to`: canary, its directory (..), or a path of its own."""

    def plant(run: Path, outside: Path) -> None:
        place = run / name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        target = {"canary": outside, "..": outside.parent}.get(to, Path(to))
        place.symlink_to(target)

    return plant


def chained(run: Path, outside: Path) -> None:
    (run / "between").symlink_to(os.path.relpath(outside, run))
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to("between")


def second_name(name: str) -> Plant:
    def plant(run: Path, outside: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).hardlink_to(outside)

    return plant


def piped(name: str) -> Plant:
    def plant(run: Path, outside: Path) -> None:
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    return plant


FILES = ("train.log", "train.rank1.log", "metrics.jsonl", "metrics.damaged.jsonl", "result.json", ".result.json.reserve",
         "run.lock", "config.yaml", "attempts/000.yaml", "attempts/001.yaml", "judge.jsonl", f"{STEP}/manifest.json",
         f"{STEP}/adapter/adapter_model.safetensors", f"{STEP}/state/progress.json", f"{STEP}/evil $(touch pwned)")  # fmt: skip
FOLDERS = ("attempts", "checkpoints", STEP, f"{STEP}/adapter", f"{STEP}/state", f"{STEP}/tokenizer", "FINAL", "rollouts",
           "rounds", "tensorboard", "wandb", "checkpoints/superseded-001", "checkpoints/.partial-step-00000004", ".partial-FINAL",
           "checkpoints/.replaced-step-00000002")  # fmt: skip
LEAVING: dict[str, tuple[Plant, str]] = {
    **{f"{name} is a link": (linked(name), "that leaves") for name in FILES},
    **{f"{name} is a link to a directory": (linked(name, to=".."), "that leaves|no run|is missing") for name in FOLDERS},
    "a dangling link": (linked("train.log", to="/nowhere/at/all"), "train.log is a link that leaves"),
    "a link to a full device": (linked("metrics.jsonl", to="/dev/full"), "metrics.jsonl is a link that leaves"),
    "a link upwards": (linked("checkpoints/step-00000003", to=".."), "that leaves"),
    "a link to everything": (linked("FINAL", to="/"), "FINAL is a link that leaves"),
    "a chain of links": (chained, "that leaves"),
    "a second name of the log": (second_name("train.log"), "second name"),
    "a second name of the metrics": (second_name("metrics.jsonl"), "second name"),
    **{f"{name} is a pipe": (piped(name), "is a pipe|no run")
       for name in ("metrics.jsonl", "config.yaml", "run.lock", "result.json", f"{STEP}/manifest.json", "attempts/000.yaml")},
}  # fmt: skip


@pytest.mark.parametrize(("plant", "said"), LEAVING.values(), ids=LEAVING)
def test_what_leads_out_of_a_run_is_refused_before_it_is_followed(
    run: Path, outside: Path, plant: Plant, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(run, outside)
    status, words = told([f"resume={run}"], capsys, monkeypatch)
    assert status == 2
    assert any(part in words for part in said.split("|")), words
    assert "\n" not in words.strip()
    for command in ("ls", "verify"):  # they read, and say what they can
        told(["checkpoint", command, str(run)], capsys, monkeypatch)


def test_a_run_may_lie_behind_a_link_and_hold_links_of_its_own(
    run: Path, outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").symlink_to(run)
    (run / "newest").symlink_to(STEP)
    assert told([f"resume={tmp_path / 'here'}"], capsys, monkeypatch)[0] == 0
    assert (run / "FINAL").is_dir()


# --- lists that are sealed and say nonsense --------------------------------------------------------------------------------


def resealed(**changes: Any) -> Plant:
    def plant(run: Path, outside: Path) -> None:
        path = run / STEP / "manifest.json"
        facts = json.loads(path.read_text())
        facts.pop("seal")
        files = facts["files"] | changes.pop("more", {}) if isinstance(facts.get("files"), dict) else {}
        path.write_text(manifest.seal(json.dumps({**facts, "files": files, **changes}, indent=1)))

    return plant


LISTED = {"bytes": 9, "sha256": "0" * 64}
SEALED: dict[str, Plant] = {
    "a path upwards": lambda run, outside: resealed(more={"../../../outside/canary": LISTED})(run, outside),
    "a path from the root": lambda run, outside: resealed(more={str(outside): LISTED})(run, outside),
    "a name that speaks to the terminal": resealed(more={"\x1b]0;evil\x07\nerror: forged": LISTED}),
    "half of a character": resealed(more={"\ud800": LISTED}),
    "a size that is none": resealed(more={"x": {"bytes": "many", "sha256": 5}}),
    "facts that are none": resealed(more={"x": 5}),
    "files that are a list": resealed(files=["x"]),
    "no files": resealed(files=None),
    "a format that is text": resealed(format="1"),
    "no format": resealed(format=None),
    "a step that is text": resealed(step="2"),
    "a list": lambda run, _: (run / STEP / "manifest.json").write_text(manifest.seal("[]\n}")),
    "lists without end": lambda run, _: (run / STEP / "manifest.json").write_text(manifest.seal("[" * 10**5 + "\n}")),
    "a long number": lambda run, _: (run / STEP / "manifest.json").write_text(manifest.seal('{"format": ' + "1" * 5000 + "\n}")),
    "bytes that are no text": lambda run, _: (run / STEP / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "a directory": lambda run, _: ((run / STEP / "manifest.json").unlink(), (run / STEP / "manifest.json").mkdir()),
}


@pytest.mark.parametrize("plant", SEALED.values(), ids=SEALED)
def test_a_list_that_is_sealed_and_says_nonsense_is_damage(
    run: Path, outside: Path, plant: Plant, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(run, outside)
    for words in (["checkpoint", "verify", str(run)], ["checkpoint", "ls", str(run)], [f"resume={run}"]):
        status, said = told(words, capsys, monkeypatch)
        assert status == {"verify": 1, "ls": 0}.get(words[1] if len(words) > 1 else "", 2), said
        assert not {"\x1b", "\x07"} & set(said)
        assert "\nerror: forged" not in said


# --- whole and sealed, with files that are not what they are called ----------------------------------------------------------


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def holding(name: str, content: bytes | str, *, pad: int = 0) -> Plant:
    def plant(run: Path, outside: Path) -> None:
        data = content.encode("utf-8", errors="surrogatepass") if isinstance(content, str) else content
        (run / STEP / name).write_bytes(data + b"\0" * pad)
        sealed(run)

    return plant


def with_facts(name: str, **facts: Any) -> Plant:
    def plant(run: Path, outside: Path) -> None:
        path = run / STEP / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
        sealed(run)

    return plant


def sealed(run: Path) -> None:
    (run / STEP / "manifest.json").write_text(manifest.describe(run / STEP, {"step": 2, "world_size": 1}))
    select.record_commit(RunDir(run), run / STEP)  # as a stranger would, whose list of saves is his own too


def pickled(name: str) -> Plant:
    def plant(run: Path, outside: Path) -> None:
        (run / STEP / name).write_bytes(pickle.dumps(Payload(outside.parent.parent / "pwned")))
        sealed(run)

    return plant


WEIGHTS, PROGRESS = "adapter/adapter_model.safetensors", "state/progress.json"
HUGE = (2**40).to_bytes(8, "little")
LONG = b'{"a": {"dtype": "F32", "shape": [1000000000, 1000000000], "data_offsets": [0, 4000000000000000000]}}'
CONTENT: dict[str, Plant] = {
    "weights that are a pickle": pickled(WEIGHTS),
    "weights with a header of a terabyte": holding(WEIGHTS, HUGE + b"{}"),
    "weights of an exabyte": holding(WEIGHTS, len(LONG).to_bytes(8, "little") + LONG),
    "weights that are empty": holding(WEIGHTS, b""),
    "an optimizer that is a pickle": pickled("state/optimizer/shard-00001-model-00001-of-00001.safetensors"),
    "random numbers that are a pickle": pickled("state/random-00000.safetensors"),
    "progress that is a list": holding(PROGRESS, "[]"),
    "progress without a step": holding(PROGRESS, "{}"),
    "progress at a step that is text": with_facts(PROGRESS, step="two"),
    "progress at another step": with_facts(PROGRESS, step=10**18),
    "progress with hooks that are none": with_facts(PROGRESS, hooks=[1]),
    "progress with a window that is none": with_facts(PROGRESS, window={"loss": "x"}),
    "progress without end": holding(PROGRESS, "[" * 10**5),
    "settings of the optimizer that are a list": holding("state/optimizer.json", "[1]"),
    "a lineage of nonsense": holding("lineage.json", '{"format": 1, "runs": [[]]}'),
}


@pytest.mark.parametrize("plant", CONTENT.values(), ids=CONTENT)
def test_a_checkpoint_whose_files_are_not_what_they_are_called_is_one_message(
    run: Path, outside: Path, plant: Plant, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(run, outside)
    assert manifest.verify(run / STEP) == []
    status, words = told([f"resume={run}"], capsys, monkeypatch)
    assert status == 2, words
    assert len(words) < 1000
    assert "step-00000002" in words, words


def test_what_a_hook_cannot_take_back_is_one_message(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_facts(PROGRESS, hooks={"early_stopping": [1]})(run, outside)
    status, words = told([f"resume={run}", "train.early_stopping=1", "train.eval_every=1"], capsys, monkeypatch)
    assert status == 2, words
    assert "cannot be restored" in words
    assert "resume from another checkpoint" in words


# --- an adapter to export or to merge ----------------------------------------------------------------------------------------


def test_an_export_copies_nothing_from_elsewhere(
    run: Path, outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "adapter"
    for name in (
        "tokenizer_secret.json",
        "vocab.txt",
        "merges.txt",
        "adapter_model.safetensors",
        "adapter_config.json",
        "deep/er",
    ):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(run / STEP / "adapter", place)
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(outside)
        for words in (["--adapter"], ["--merged"]):
            status, said = told(
                ["checkpoint", "export", str(place), "--output", str(tmp_path / "o"), *words], capsys, monkeypatch
            )
            assert (status, "that leaves" in said, (tmp_path / "o").exists()) == (2, True, False), said


def test_an_adapter_of_the_hubs_cache_is_exported_although_its_files_are_links(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "models--org--name"
    shutil.copytree(run / STEP / "adapter", home / "blobs")
    (home / "snapshots" / "1234").mkdir(parents=True)
    for file in (home / "blobs").iterdir():
        (home / "snapshots" / "1234" / file.name).symlink_to(f"../../blobs/{file.name}")
    words = ["checkpoint", "export", str(home / "snapshots" / "1234"), "--output", str(tmp_path / "out"), "--adapter"]
    assert told(words, capsys, monkeypatch)[0] == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def elsewhere(adapter: Path, base: Path, outside: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    named = {"base_model_name_or_path": str(outside.parent)}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **named}))


def with_code(adapter: Path, base: Path, outside: Path) -> None:
    mark = outside.parent.parent / "pwned"
    (base / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass E: ...")
    auto = {name: "evil.E" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "auto_map": auto, "model_type": "evil"}))


def indexed(name: str) -> Callable[[Path, Path, Path], None]:
    def plant(adapter: Path, base: Path, outside: Path) -> None:
        index = {"weight_map": dict.fromkeys(["a", "b"], name.format(outside))}
        in_parts(base).write_text(json.dumps(index))

    return plant


def in_parts(base: Path) -> Path:
    """The index of a base in parts, which is the first thing that is asked of it then."""
    (base / "model.safetensors").rename(base / "part.safetensors")
    return base / "model.safetensors.index.json"


def spoilt(where: str, name: str, text: str) -> Callable[[Path, Path, Path], None]:
    def plant(adapter: Path, base: Path, outside: Path) -> None:
        if name.endswith("index.json"):
            in_parts(base)
        (adapter / "vocabulary.json").unlink(missing_ok=True)  # with which no tokenizer is asked
        ({"adapter": adapter, "base": base}[where] / name).write_text(text)

    return plant


MERGES = {
    "a base that is elsewhere": (elsewhere, []),
    "a base with code": (with_code, ["--base"]),
    "an index that leads upwards": (indexed("../outside/canary"), ["--base"]),
    "an index that leads to the root": (indexed("{}"), ["--base"]),
    "an index that is a list": (spoilt("base", "model.safetensors.index.json", "[]"), ["--base"]),
    "a config that is a list": (spoilt("base", "config.json", "[1]"), ["--base"]),
    "a config without end": (spoilt("base", "config.json", '{"a":' * 10**5), ["--base"]),
    "settings that are a list": (spoilt("adapter", "adapter_config.json", "[]"), ["--base"]),
    "settings of another kind": (spoilt("adapter", "adapter_config.json", '{"peft_type": "EVIL"}'), ["--base"]),
    "settings with values of other kinds": (
        spoilt("adapter", "adapter_config.json", '{"peft_type": "LORA", "r": "x", "target_modules": 5}'), ["--base"]
    ),
    "a tokenizer that is none": (spoilt("adapter", "tokenizer.json", '{"model": {"type": "Evil"}}'), ["--base"]),
}  # fmt: skip


@pytest.mark.parametrize(("plant", "words"), MERGES.values(), ids=MERGES)
def test_a_strangers_base_or_adapter_is_not_merged_and_runs_no_code(
    run: Path, outside: Path, tmp_path: Path, cache: Path, plant: Any, words: list[str],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    built = locate("tiny", None, cache)
    base, adapter = shutil.copytree(built, tmp_path / "base"), shutil.copytree(run / STEP / "adapter", tmp_path / "adapter")
    for name in ("lineage.json", "manifest.json"):  # which a stranger's has not, or makes to fit
        (adapter / name).unlink()
    plant(adapter, base, outside)
    given = [*words, str(base)] if words else []
    command = ["checkpoint", "merge", str(adapter), "--output", str(tmp_path / "out"), *given]
    status, said = told(command, capsys, monkeypatch)
    assert status == 2, said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1, said
    assert not (tmp_path / "out").exists()


# --- a base that lies in the run, and a configuration ------------------------------------------------------------------------


def configured(run: Path, **changes: Any) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in changes.items():
        node, *parents, name = settings, *key.split("__")
        for parent in parents:
            node = node[parent]
        node[name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(settings))


def test_a_resume_writes_no_cache_where_a_saved_run_says(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(run, cache_dir=str(outside.parent), output_root=str(outside.parent))
    status, said = told([f"resume={run}"], capsys, monkeypatch)
    assert (status, str(outside.parent) in said) == (0, True), said


YAMLS = {
    "a tag": "loss: !!python/object/apply:os.system ['touch pwned']\n",
    "aliases without end": "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)),
    "lists in lists": "loss: " + "[" * 5000 + "\n", "a list": "- a\n", "a number": "5\n",
    "keys that are none": "1: 2\n? [a]\n: b\n",
    "a date": "2001-01-01: 2001-01-01\n", "bytes": "a: !!binary aGFsbG8=\n",
}  # fmt: skip


@pytest.mark.parametrize("where", ["config.yaml", "attempts/000.yaml"])
@pytest.mark.parametrize("text", YAMLS.values(), ids=YAMLS)
def test_a_configuration_of_nonsense_is_one_message(
    run: Path, outside: Path, tmp_path: Path, where: str, text: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (run / where).write_text(text)
    if where == "attempts/000.yaml":
        monkeypatch.setattr(single, "run", lambda *_: 2)  # a record that says nothing of a change may be passed over
    status, words = told([f"resume={run}"], capsys, monkeypatch)
    assert status == 2, words
    assert len(words) < 1000


@pytest.mark.parametrize(
    "word",
    ["+hydra.callbacks.a._target_=os.system", "--config-dir=/tmp", "hydra/launcher=evil", "hydra.searchpath=[/tmp]",
     "run_dir=/tmp", "++plugins=[evil]", "resume=/tmp/x", "x y", "overwrite=true", "optim@hydra.launcher=adamw", "loss"],
)  # fmt: skip
def test_words_of_saved_rounds_are_values_of_a_training_and_no_more(tmp_path: Path, word: str) -> None:
    from halos.online.rounds import stored_overrides

    (tmp_path / "online.json").write_text(json.dumps({"words": ["loss=dpo", "optim.lr=1e-4", "+loss.x=1", word]}))
    with pytest.raises(UserError, match="never taken from a saved run"):
        stored_overrides(tmp_path)
    (tmp_path / "online.json").write_text(json.dumps({"words": ["loss=dpo", "~loss.beta", "plugins=[mine]", "cache_dir=/c"]}))
    assert stored_overrides(tmp_path) == ["loss=dpo", "~loss.beta"]


# --- mutations ---------------------------------------------------------------------------------------------------------------

SMALL_FILES = (
    "config.yaml", "attempts/000.yaml", "metrics.jsonl", "result.json", f"{STEP}/manifest.json", f"{STEP}/metrics.json",
    f"{STEP}/lineage.json", f"{STEP}/state/progress.json", f"{STEP}/state/optimizer.json",
)  # fmt: skip


def test_no_mutation_of_a_runs_small_files_is_a_traceback(begun: Path, tmp_path: Path) -> None:
    """Seeded: bytes flipped, cut out, doubled and replaced. What is read is right, or refused in one message."""
    draw, run = random.Random(1), RunDir(shutil.copytree(begun, tmp_path / "run"))
    step, refused = run.path / STEP, 0
    asked: tuple[Callable[[], object], ...] = (
        run.require_run, lambda: resume.last_settings(run), run.read_metrics, run.read_result, run.next_attempt, run.is_finished,
        lambda: select.newest(run.checkpoints), lambda: select.refuse_misplaced(run), lambda: select.metrics_of(step),
        lambda: lineage.read(step), lambda: state.load_progress(step / "state", 2), lambda: manifest.verify(step, contents=False),
        lambda: read_runs([run.path]),
    )  # fmt: skip
    for turn in range(270):
        name = SMALL_FILES[turn % len(SMALL_FILES)]
        whole = (begun / name).read_bytes()
        changed = mutated(whole, draw)
        if name.endswith("manifest.json") and turn % 2:  # sealed anew, as a stranger would
            text = changed.decode("utf-8", errors="replace")
            changed = manifest.seal(text.rpartition(manifest.SEAL)[0] + "\n}").encode("utf-8", errors="replace")
        (run.path / name).write_bytes(changed)
        for ask in asked:
            try:
                ask()
            except UserError as error:
                refused += 1
                assert len(str(error)) < 1500  # noqa: PT017  read or refused: either is right
        (run.path / name).write_bytes(whole)
    assert refused > 100


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Some bytes of it are others."""
    for _ in range(draw.randint(1, 4)):
        at, more = draw.randrange(len(data)), draw.randint(1, 12)
        others = (
            b"",
            draw.randbytes(more),
            data[at : at + more] * 2,
            b"[" * 2000,
            b"9" * 5000,
            b"\\ud800",
            b"\x00",
            b"null",
            b"- ",
        )
        data = data[:at] + draw.choice(others) + data[at + draw.choice((0, 1, more)) :]
    return data
