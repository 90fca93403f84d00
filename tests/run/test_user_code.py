"""An optimizer, a schedule, a trainer and a format of the user's own, as the manual has them: trained, stopped and resumed."""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from world import World, refusal, resume, stopped

import train
from halos.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MANUAL = "".join((ROOT / path).read_text() for path in ("config/README.md", "halos/data/README.md", "halos/losses/README.md"))
OURS = ("optim", "schedule", "data.format", "trainer", "plugins")
PACKAGES = ("myoptim", "myrates", "myrows", "mytrainers")


def overrides_of(name: str) -> list[str]:
    """What the manual's command with this exp_name types of these extensions."""
    [line] = re.findall(rf"^python train.py (.*exp_name={name})$", MANUAL, re.M)
    return [word for word in shlex.split(line) if word.startswith(OURS)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> World:
    return World(tmp_path_factory.mktemp("own"), cache)


@pytest.fixture(autouse=True)
def packages(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, code in re.findall(r"```python\n# ([\w/]+\.py)\n(.*?)```", MANUAL, re.S):
        (world.place / name).parent.mkdir(exist_ok=True)
        (world.place / name).write_text(code)
    monkeypatch.syspath_prepend(str(world.place))
    yield world.place
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]


@contextmanager
def edited(code: Path, old: str, new: str) -> Iterator[None]:
    """The user's package with a change, as a new process would import it."""
    text = code.read_text()
    assert old in text
    code.write_text(text.replace(old, new))
    forget()
    yield
    code.write_text(text)
    forget()


def begin(world: World, name: str, *words: str) -> Path:
    """A run that is finished."""
    assert train.start([*world.words(name), f"output_root={world.place / 'runs'}", f"cache_dir={world.cache}", *words]) == 0
    return world.place / "runs" / name


def mistake(world: World, *words: str) -> str:
    """The one line with which a run is refused before it has a directory."""
    with pytest.raises(UserError) as caught:
        begin(world, "wrong", *words)
    assert "\n" not in str(caught.value)
    assert not (world.place / "runs" / "wrong").exists()
    return str(caught.value)


def weights(directory: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(directory / "FINAL" / "model.safetensors").items()}


def test_an_optimizer_and_a_schedule_of_the_manual_train_and_resume_bit_for_bit(world: World, packages: Path) -> None:
    words = [*overrides_of("lion"), "checkpoint.keep_last=9"]
    directory = begin(world, "lion", *words)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] / 1e-4 for row in rows if row["split"] == "train"]
    assert rates == pytest.approx([1.0, 0.1, 1.0, 0.1]), "two periods in four steps"
    whole = weights(directory)
    stopped(directory)
    with edited(packages / "myrates.py", "return least", "return least * 1.0"):
        assert "schedule._target_ myrates.waves (content) " in refusal(directory, "plugins=[myoptim,myrates]")
    assert "plugins=[myoptim]" in refusal(directory, "plugins=[myrates]")
    assert resume(directory, "plugins=[myoptim,myrates]") == 0
    assert weights(directory) == whole


def test_lion_moves_by_the_sign_of_its_mean(packages: Path) -> None:
    import torch
    from myoptim.lion import Lion  # type: ignore[import-not-found]

    parameter = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimizer = Lion([{"params": [parameter], "weight_decay": 0.5}], lr=0.1)
    parameter.grad = torch.tensor([3.0, -2.0, 0.0])
    optimizer.step()
    assert parameter.tolist() == pytest.approx([0.95 - 0.1, 0.95 + 0.1, 0.95])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["optim.beta3=1"], "optim.beta3: Lion takes no 'beta3'; it takes lr"),
        (["optim.beta1=much"], "optim.beta1 takes a number, not 'much'"),
        (["optim._target_=myoptim.lion.lion"], "myoptim.lion has no 'lion'; it has Lion"),
        (["optim._target_=myrates.waves"], "optim.beta2: waves takes no 'beta2'"),
        (["schedule._target_=myoptim.lion.Lion"], "schedule.periods: Lion takes no 'periods'"),
        (["schedule.least=-1"], "schedule waves gives -1.0 at step 1 of 4: it must be a number from 0 up"),
        (["schedule.periods=none"], "schedule.periods takes a whole number, not 'none'"),
        (["plugins=[]"], r"add plugins=\[myrates\]"),
    ],
)
def test_mistakes_in_them_are_reported_by_key(world: World, change: list[str], words: str) -> None:
    assert re.search(words, mistake(world, *overrides_of("lion"), *change))


def test_a_trainer_of_the_manual_trains_and_resumes_bit_for_bit(world: World, packages: Path) -> None:
    directory = begin(world, "clipped", *overrides_of("clipped"), "checkpoint.keep_last=9")
    whole = weights(directory)
    largest = max(np.abs(np.frombuffer(value, np.float32)).max() for value in whole.values())
    assert largest == pytest.approx(0.05), "its step is the one that was made"
    assert "trainer    mytrainers.Clipped limit=0.05" in (directory / "train.log").read_text()
    stopped(directory)
    assert "plugins=[mytrainers]" in refusal(directory)
    assert "trainer.limit 0.05 -> 0.1" in refusal(directory, "plugins=[mytrainers]", "trainer.limit=0.1")
    assert "trainer.limit: Trainer takes no 'limit'" in refusal(directory, "trainer._target_=null")
    with edited(packages / "mytrainers.py", "-self.limit, self.limit", "-self.limit, 2 * self.limit"):
        assert "trainer._target_ mytrainers.Clipped (content) " in refusal(directory, "plugins=[mytrainers]")
    assert resume(directory, "plugins=[mytrainers]") == 0
    assert weights(directory) == whole


def test_a_run_older_than_the_key_has_the_trainer_of_its_loss(world: World, packages: Path) -> None:
    directory = begin(world, "older")
    config = directory / "config.yaml"
    assert "trainer:\n  _target_: null\n" in config.read_text()
    config.write_text(config.read_text().replace("trainer:\n  _target_: null\n", ""))
    stopped(directory)
    message = refusal(directory, "plugins=[mytrainers]", *overrides_of("clipped")[:2])
    assert "would no longer compute what it began: trainer {_target_: null} -> " in message
    assert resume(directory) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["trainer.limit=0"], r"trainer.limit takes a number \(above 0\), not 0"),
        (["trainer.limits=1"], "trainer.limits: Clipped takes no 'limits'; it takes limit"),
        (["trainer._target_=null"], "trainer.limit: Trainer takes no 'limit'; it takes no keys"),
        (["trainer._target_=mytrainers.np"], "mytrainers.np is no trainer for loss=dpo, which takes Pair: derive a class from"),
        (["loss=grpo"], "no trainer for loss=grpo, which takes Rollouts: derive a class from halos.trainers.policy_gradient.Pol"),
        (["plugins=[]"], r"plugins=\[mytrainers\]"),
    ],
)
def test_mistakes_in_a_trainer_are_reported_before_a_model_loads(
    world: World, change: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halos.run.prepare.structure_of", lambda *_: pytest.fail("a model is read"))
    assert re.search(words, mistake(world, *overrides_of("clipped"), *change))


def votes(place: Path) -> Path:
    rows = [{"question": f"Count {n}", "answers": [{"text": f"one {n % 7}", "votes": n + 1}, {"text": f"no {n}", "votes": 0}]}
            for n in range(24)]  # fmt: skip
    path = place / "votes.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"question": "Who?", "answers": []}]))
    return path


def test_a_format_of_the_manual_trains_as_equal_pairs_do_and_changed_code_is_refused(world: World, packages: Path) -> None:
    pairs = begin(world, "pairs")
    given = [f"data.train=[{votes(world.place)}]", "data.eval=[]"]
    directory = begin(world, "votes", *overrides_of("votes"), *given)
    assert weights(directory) == weights(pairs), "the same pairs in the same order"
    assert "1 left out by data.format" in (directory / "train.log").read_text()
    stopped(directory)
    with edited(packages / "myrows.py", "def by_votes", "# no other rows\ndef by_votes"):
        message = refusal(directory, "plugins=[myrows]")
    assert "data.format myrows.by_votes (content) " in message
    assert "data.train" not in message, "whose rows are the same"
    with edited(packages / "myrows.py", '["question"]', '["question"] + "!"'):
        message = refusal(directory, "plugins=[myrows]")
        assert resume(directory, "plugins=[myrows]", "resume_changes=allow") == 0
    assert "a format of yours" in message, "which makes other rows of the same files"
