"""The layout shows the architecture: imports point one way, and what the README tells people to type works."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import train
from halos.config.changes import Change
from halos.config.schema import Config

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    {"errors", "types"},
    {"confined"},
    {"hashes"},
    {"config", "logps", "losses", "metrics", "metrics_file", "journal", "lock", "logs", "versions"},
    {"rundir", "distributed"},
    {"merge"},
    {"models", "data"},
    {"checkpoint"},
    {"hooks"},
    {"trainers"},
    {"online"},
    {"run"},
    {"report", "sweep"},  # they read what runs left; no run imports them
]
SIDE_BY_SIDE = {"config", "losses"}  # the gate binds losses by name
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def imports(path: Path) -> set[str]:
    """Rooms of halos that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "halos":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("halos.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", sorted((ROOT / "halos").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_a_floor(path: Path) -> None:
    room = path.relative_to(ROOT / "halos").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for other in imports(path) - {room}:
        beside = {room, other} <= SIDE_BY_SIDE
        assert LEVEL[other] < LEVEL[room] or beside, f"{room} imports {other}, which is not below it"
    if path.name != "train.py":
        assert "hydra" not in re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M), "only train.py imports hydra"


def test_nothing_at_the_top_level_but_what_belongs_there() -> None:
    allowed = {"config", "train.py", "halos", "launch", "tests", "requirements.txt", "README.md", "pyproject.toml", "LICENSE"}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found <= allowed | {"runs", "report", "wandb", "halos.egg-info"}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def words_of(command: str) -> list[str]:
    words = shlex.split(command)
    return words[words.index("train.py") + 1 :]


def prepare(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that a documented command names, in the current directory."""
    for name in re.findall(r"[\w/]+\.(?:jsonl|parquet)", command):
        (place / name).write_text("{}")
    for name, code in re.findall(r"```python\n# ([\w/]+\.py)\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        (place / name).parent.mkdir()
        (place / name).write_text(code)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.chdir(place)


TRAINING = [line for line in commands() if "train.py" in line and "resume=runs" not in line]


@pytest.mark.parametrize("command", [line for line in TRAINING if " -m " not in line])
def test_every_documented_training_command_composes_and_binds(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(command, tmp_path, monkeypatch)
    seen = []

    def run(config: Config, typed: list[str], changed: list[Change], places: list[Path] | None = None) -> int:
        if places:  # online rounds: what is typed for the training within composes too
            train.inner(config, train.inner_words(typed, config), places)
        seen.append(config)
        return 0

    monkeypatch.setattr(train, "run", run)
    assert (train.start(words_of(command)), len(seen)) == (0, 1)


@pytest.mark.parametrize("command", [line for line in TRAINING if " -m " in line])
def test_every_documented_sweep_is_one_that_would_start(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(command, tmp_path, monkeypatch)
    started = []
    monkeypatch.setattr(train, "enter_hydra", lambda words, known: started.append(words) or 0)
    monkeypatch.setattr(train, "report", lambda places: None)
    assert train.start(words_of(command)) == 0
    assert len(started) == 1


def test_every_file_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"(?:launch|config|halos|tests)/[\w/.-]+\.(?:py|sh|yaml)", text):
        assert (ROOT / path).exists(), path
