"""A scorer is one file: what the rest of the code asks of it is what its class declares."""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

import halos.rollout.scorers
from halos.config import paths, resume_policy
from halos.config.resume_policy import PreviousRun
from halos.config.rollout_modules import scorer_class, scorer_names
from halos.config.schema import Config, Scorer
from halos.config.secrets import refuse_saved_addresses
from halos.errors import UserError
from halos.online.label import main as label
from halos.online.label import parser
from halos.online.options import SCORER, ScorerOptions
from halos.online.stages import Stages
from halos.rollout.scorers import scorer
from halos.run import input_hashes

ROOT = Path(__file__).resolve().parents[2]
HALOS = ROOT / "halos"
SHOUT = """
from halos.errors import UserError
from halos.rollout.scorers.scorer import Option, Scorer
from halos.rollout.types import Score

class Shout(Scorer):
    option = Option("--shout", "the number of exclamation marks", key="model")
    takes = ("label", "model", "url")
    loads_model, paths = True, ("model",)

    @classmethod
    def problem(cls, settings, spelled):
        return f"{spelled('label')}={settings.label}: nobody shouts 13 times" if settings.label == 13 else None

    @classmethod
    def open(cls, settings, context):
        scorer = cls()
        scorer.most = MOST
        return scorer

    def check_prompts(self, prompts):
        if not any("!" in str(prompt.turns) for prompt in prompts):
            raise UserError("nobody asks for shouting")

    def name(self):
        return "shout"

    def request(self):
        return {"shout": self.most}

    def score(self, samples):
        yield from ((sample, Score(float(min(self.most, sample.text.count("!"))))) for sample in reversed(samples))

SCORER = Shout
"""
OWN_KEY = SHOUT.replace("MOST", "settings.loudest").replace('"label"', '"loudest"')


def write_samples(path: Path) -> None:
    rows = [{"prompt_id": "p", "sample_id": n, "prompt": "Shout!", "output": "so" + "!" * n} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rewards(path: Path) -> list[float]:
    return [json.loads(line)["reward"] for line in path.read_text().splitlines()]


@pytest.fixture
def shout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file, in a directory beside the package's own; the names in the schema were read before it came."""
    (tmp_path / "scorers").mkdir()
    (tmp_path / "scorers" / "shout.py").write_text(SHOUT.replace("MOST", "settings.label or 9"))
    monkeypatch.setattr(halos.rollout.scorers, "__path__", [*halos.rollout.scorers.__path__, str(tmp_path / "scorers")])
    (name,) = (each for each in fields(Scorer) if each.name == "name")
    monkeypatch.setitem(name.metadata["limits"], "one_of", scorer_names())
    yield
    sys.modules.pop("halos.rollout.scorers.shout", None)


def test_every_module_is_a_scorer_and_a_name_of_the_schema() -> None:
    (name,) = (each for each in fields(Scorer) if each.name == "name")
    assert name.metadata["limits"]["one_of"] == scorer_names() == ("function", "judge", "reward_model")
    keys = {each.name for each in fields(Scorer)}
    for each in map(scorer_class, scorer_names()):
        assert issubclass(each, scorer.Scorer)
        assert each.compares == issubclass(each, scorer.PairwiseScorer)
        read = set(re.findall(r"\bsettings\.(\w+)", Path(inspect.getfile(each)).read_text())) - {"name"}
        assert {*each.paths, *each.addresses, *filter(None, [each.option.key])} <= set(each.takes) == read <= keys


def test_a_new_file_is_a_scorer_everywhere(shout: None, configure: Callable[..., Config], tmp_path: Path) -> None:
    words = ["loss=online", "online.loss=grpo", "online.num_processes=2", "online.scorer.name=shout"]
    with pytest.raises(UserError, match=r"^online\.scorer\.label=13: nobody shouts 13 times$"):
        configure(*words, "online.scorer.label=13")
    idle = "online.scorer.rubric has no effect with online.scorer.name=shout, which takes label, model, url: leave it out"
    for typed in ("online.scorer.rubric=r.txt", "online.scorer={url: 'a,b', functions: [],rubric: r.txt}"):
        with pytest.raises(UserError, match=f"^{re.escape(idle)}$"):
            configure(*words[:3], typed, words[3])
    configure(*words, "online.scorer.rubric=null", "online.scorer.functions=[]", "online.scorer.timeout=30")
    model = tmp_path / "model"
    model.write_text("loud")
    config: Any = configure(*words, "online.scorer.url=http://loud", f"online.scorer.model={model}")
    with pytest.raises(UserError, match=r"names online\.scorer\.url=http://loud"):
        refuse_saved_addresses(config, [])
    refuse_saved_addresses(config, ["online.scorer.url"])
    command = Stages(config).label(tmp_path / "s", tmp_path / "f", kind="scalar", scores=tmp_path / "c", cache=tmp_path / "a",
                                   against=None)  # fmt: skip
    assert command[1:3] == ["-m", "accelerate.commands.launch"], "it loads a model on each of two ranks"
    assert command[command.index("--shout") + 1] == str(model)
    assert not {"--batch-size", "--processes"} & {*command}, "which it does not take"
    with pytest.raises(UserError, match="nobody asks for shouting"):
        scorer.scorer_of(config, tmp_path / "a").check_prompts([])


def test_what_its_keys_name_is_compared_at_a_resume(
    shout: None, configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").write_text("loud")
    config: Any = configure("loss=online", "online.loss=grpo", "online.scorer.name=shout", "online.scorer.model=model")
    assert config.online.scorer.model == str(tmp_path / "model")
    before = input_hashes._scorer(config, tmp_path)
    assert before.keys() == {"online.scorer.model"}
    other = replace(config, online=replace(config.online, scorer=replace(config.online.scorer, model="elsewhere")))
    (change,) = resume_policy.compare(other, PreviousRun(asdict(config), tmp_path, None, by_content=True))
    assert (change.key, change.why) == ("online.scorer.model", None)
    Path("model").write_text("louder")
    assert input_hashes._scorer(config, tmp_path) != before
    config.online.scorer.name, config.online.scorer.model = "judge", "model"
    paths._make_absolute(config)
    assert config.online.scorer.model == "model", "a judge's is a name at its API"
    other.online.scorer.name = "judge"
    (change,) = resume_policy.compare(other, PreviousRun(asdict(config), tmp_path, None, by_content=True))
    assert (change.key, change.why) == ("online.scorer.model", "")


def test_the_stage_labels_with_it(shout: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_samples(tmp_path / "s.jsonl")
    words = [str(tmp_path / "s.jsonl"), str(tmp_path / "f.jsonl"), "--shout", "loud", "--feedback", "scalar"]
    for more, said in (
        (["--label", "13"], "--label=13: nobody shouts 13 times"),
        (["--feedback", "pairwise", "--pairwise"], "--pairwise needs --judge and --feedback pairwise"),
        (["--rubric", "r.txt"], "--rubric has no effect with --shout, which takes --label, --url: leave it out"),
    ):
        assert label([*words, *more]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        label([*words, "--judge", "j"])
    assert "--judge: not allowed with argument --shout" in capsys.readouterr().err
    assert label([*words, "--label", "2"]) == 0
    assert rewards(tmp_path / "f.jsonl") == [0.0, 1.0, 2.0, 2.0]


def test_the_manuals_recipe_makes_a_scorer_and_a_key_of_its_own(tmp_path: Path) -> None:
    """In a copy of the repository: the manual's file alone; and with a key: a line in the YAML, one in the schema, and one that
    reads it."""
    for name in ("halos", "config"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    ((file, text),) = re.findall(r"```python\n# in (halos/\S+)\n(.*?)```", (HALOS / "online" / "README.md").read_text(), re.S)
    (tmp_path / file).write_text(text)
    (tmp_path / "halos" / "rollout" / "scorers" / "shout.py").write_text(OWN_KEY)
    for file, before, line in (
        ("config/loss/online.yaml", "  feedback:\n", "    loudest: 2  # exclamation marks that count\n"),
        ("halos/config/schema.py", "\n\n@dataclass\nclass Feedback", "    loudest: int = key(least=1)\n"),
    ):
        text = (tmp_path / file).read_text()
        assert text.count(before) == 1
        (tmp_path / file).write_text(text.replace(before, line + before))
    write_samples(tmp_path / "s.jsonl")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for name, words, scores in (
        ("words", ["--words"], [-1.0, -1.0, -1.0, -1.0]),
        ("default", ["--shout", "loud"], [0.0, 1.0, 2.0, 2.0]),
        ("loud", ["--shout", "loud", "--loudest", "3"], [0.0, 1.0, 2.0, 3.0]),
    ):
        command = [sys.executable, "-m", "halos.online.label", "s.jsonl", f"{name}.jsonl", *words, "--feedback", "scalar"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert rewards(tmp_path / f"{name}.jsonl") == scores


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "function", "functions": ["ends", {"function": "length", "weight": 0.1, "target": 50}], "model": None},
        {"name": "judge", "functions": [], "model": "j"},
        {"name": "reward_model", "functions": [], "model": "runs/reward/FINAL"},
    ],
    ids=scorer_names(),
)
def test_the_arguments_that_choose_a_scorer_are_parsed_as_its_settings(settings: dict[str, Any]) -> None:
    assert isinstance(SCORER, ScorerOptions)
    chosen = replace(SCORER.read(parser().parse_args(["s", "f", "--reward", "ends"]), name="function", functions=[], model=None),
                     **settings)  # fmt: skip
    assert SCORER.read_choice(parser().parse_args(["s", "f", *SCORER.choice(chosen)])) == chosen


# What else these words name: the functions of tool calls, and a loss that is asked for by another name
OTHER_MEANINGS = {
    "data/messages.py", "data/omissions.py", "data/dates.py", "data/endings.py", "data/rendering.py", "data/schemas/sharegpt.py",
    "config/suggest.py", "config/arithmetic_version.py",
}  # fmt: skip


def test_names_of_scorers_stand_nowhere_but_in_their_files() -> None:
    names = set(scorer_names())
    words = names | {scorer_class(name).option.flag for name in names}
    modules = {f"halos.rollout.scorers.{name}" for name in names}
    for path in HALOS.rglob("*.py"):
        file = path.relative_to(HALOS).as_posix()
        if file.startswith("rollout/scorers/") or file in OTHER_MEANINGS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{file}:{getattr(node, 'lineno', '')}"
            assert not (isinstance(node, ast.Constant) and node.value in words), where
            assert not (isinstance(node, ast.ImportFrom) and node.module in modules), where
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in {f"args.{name}" for name in names}), where


def test_what_a_scorer_declares_and_help_are_read_without_what_scorers_stand_on() -> None:
    code = "from halos.online.label import parser; parser().format_help(); import sys; print({*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = eval(done.stdout)
    assert {f"halos.rollout.scorers.{name}" for name in scorer_names()} <= modules
    assert not {"torch", "transformers", "openai"} & modules
