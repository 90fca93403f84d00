"""The layout shows the architecture: imports point one way, and what the README tells people to type works."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "halos").rglob("*.py"))
FLOORS = [
    {"collection", "redaction", "transfer"},
    {"errors", "examples", "intervals", "ranges", "repository", "reward_kind", "sequences"},
    {"loss_result"},
    {"types"},
    {"confined"},
    {"hashes"},
    {"seals"},
    {"config", "logps", "losses", "optimizers", "schedules", "metrics", "metrics_file", "journal", "lock", "logs", "versions"},
    {"result_file", "distributed"},
    {"rundir"},
    {"merge", "hooks"},
    {"models", "data"},
    {"checkpoint", "prove"},
    {"export", "inspection", "rollout"},
    {"trainers"},
    {"certify", "online"},
    {"run"},
    {"report", "sweep"},  # they read finished runs; no run imports them
    {"cli"},
]
SAME_FLOOR = {"config", "losses"}  # validation binds losses by name
LEVEL = {package: level for level, floor in enumerate(FLOORS) for package in floor}


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text())))


def package_of(path: Path) -> str:
    return path.relative_to(ROOT / "halos").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Packages of halos that a file imports, anywhere in it."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "halos":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("halos.")}
    return found - {"__version__"}


def test_imports_point_down_a_floor() -> None:
    assert len(MODULES) > 250
    for path in MODULES:
        package = package_of(path)
        if package == "__init__" or path.name == "__main__.py":  # a command may import from everywhere
            continue
        for other in imports(path) - {package}:
            same_floor = {package, other} <= SAME_FLOOR
            assert LEVEL[other] < LEVEL[package] or same_floor, f"{path} imports {other}, which is not on a lower floor"


def test_only_the_command_line_imports_hydra() -> None:
    for path in MODULES:
        imported = re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M)
        assert package_of(path) == "cli" or path.name == "__main__.py" or "hydra" not in imported, path


def test_the_generated_architecture_is_up_to_date() -> None:
    script = [sys.executable, str(ROOT / "launch" / "architecture.py")]
    generated = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "halos" / "README.md").read_text() == generated, "python launch/architecture.py > halos/README.md"


# what distinguishes strategies: their modules, their attributes of parameters, and the launcher's variables that request them
STRATEGY = re.compile(
    r"\b(FSDPModule|fully_shard|DTensor|DistributedDataParallel|Zero|strategies|deepspeed\w*|fsdp2|replicated|zero|ds_\w+)\b|"
    r"ACCELERATE_USE_"
)


def names_in(path: Path) -> set[str]:
    """Identifiers of a file, and strings that could be an attribute or a variable of a strategy."""
    found = set()
    for node in nodes(path):
        found |= {node.id} if isinstance(node, ast.Name) else {node.attr} if isinstance(node, ast.Attribute) else set()
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("halos.rollout.engines"):  # which sample
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.match(r"ds_|ACCELERATE_USE_", node.value):
            found.add(node.value)
    return found


def test_only_the_strategies_know_which_strategy_runs() -> None:
    """Other code asks the Strategy; `strategies.requested_strategy` is called only in run/prepare.py."""
    for path in MODULES:
        if package_of(path) == "distributed":
            continue
        asking = {name for name in names_in(path) if STRATEGY.search(name)}
        assert asking <= ({"strategies"} if path == ROOT / "halos" / "run" / "prepare.py" else set()), path


def test_files_and_functions_are_short() -> None:
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 300, path
        functions = [node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        long = [node.name for node in functions if (node.end_lineno or node.lineno) - node.lineno >= 45]
        assert not long, path


def test_the_entry_is_a_page() -> None:
    assert len((ROOT / "train.py").read_text().splitlines()) <= 60


# Loaders of models, tokenizers and configurations, which may run code; those of PEFT and of generation settings run none
LOADERS = re.compile(r"(?:Auto\w+|auto)$")


def test_every_loader_of_transformers_refuses_remote_code() -> None:
    for path in MODULES:
        for node in nodes(path):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                refuses_remote_code(node, node.func, f"{path}:{node.lineno}")


def refuses_remote_code(call: ast.Call, method: ast.Attribute, where: str) -> None:
    owner = method.value.id if isinstance(method.value, ast.Name) else getattr(method.value, "attr", "")
    if method.attr in ("from_pretrained", "from_config") and LOADERS.match(owner):
        spread = {word.value.id for word in call.keywords if word.arg is None and isinstance(word.value, ast.Name)}
        assert spread & {"NO_CODE", "SAFELY", "extra"}, f"{where}: **NO_CODE or **SAFELY is missing"
    assert not {word.arg for word in call.keywords} & {"trust_remote_code"}, f"{where}: decided in halos/confined.py"


def test_nothing_at_the_top_level_but_what_belongs_there() -> None:
    allowed = {"config", "train.py", "halos", "launch", "tests", "requirements.txt", "README.md", "pyproject.toml", "LICENSE"}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found <= allowed | {"runs", "report", "wandb", "halos.egg-info", "__pycache__"}


def test_every_slow_test_is_in_one_group_that_can_be_run_alone() -> None:
    script = (ROOT / "launch" / "test.sh").read_text()
    paths = [ROOT / path for group in re.findall(r"^    \w+\) echo (.*) ;;$", script, re.M) for path in group.split()]
    slow = [path for path in (ROOT / "tests").rglob("test_*.py") if re.search(r"\bmark\.slow\b", path.read_text())]
    for file in slow:
        assert len([path for path in paths if file.is_relative_to(path)]) == 1, (
            f"{file.relative_to(ROOT)} belongs into a group of launch/test.sh"
        )


def test_no_two_test_files_share_a_name() -> None:
    """pytest takes them for one, and collects nothing."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py") if not (path.parent / "__init__.py").is_file()]
    assert sorted(names) == sorted(set(names))
