"""The hash of a user's code covers all of the user's that it runs, and is of the code that this process has imported."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from halos.config import plugins
from halos.config.plugins import code_hash
from halos.config.signature import import_target
from halos.errors import UserError

FILES = {
    "ownloss/__init__.py": "",
    "ownloss/hinge.py": "import ownhelper, owndeep.below.inner\nfrom . import margins\nimport numpy\n\n\n"
    "def hinge(): from ownlazy.inner import scale; from ownspace.inner.most import a",
    "ownloss/margins.py": "MARGIN = 1.0\n",
    "ownloss/unused.py": "MARGIN = 1.0\n",
    "ownhelper.py": "import ownbelow\n",
    "ownbelow.py": "import ownloss\n",
    "ownlazy/__init__.py": "raise RuntimeError('imported')\n",
    "ownlazy/inner.py": "scale = 1\n",
    "owndeep/__init__.py": "SCALE = 1\n",
    "owndeep/below/__init__.py": "",
    "owndeep/below/inner.py": "",
    "ownspace/inner/most.py": "a = 1\n",  # of namespace packages
    "ownother.py": "",
}


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    forget()


def forget() -> None:
    """Unload everything, as in a new process."""
    for name in [name for name in sys.modules if name.startswith("own")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def load() -> str | None:
    import_target("ownloss.hinge.hinge", "loss._target_", ["ownloss", "ownhelper"], example="x.y")
    return code_hash("ownloss.hinge.hinge")


@pytest.mark.parametrize(
    "name", [name for name in FILES if name not in ("ownloss/unused.py", "ownother.py", "ownlazy/__init__.py")]
)
def test_the_hash_covers_other_plugins_and_what_is_imported_later(name: str, code: Path) -> None:
    before = load()
    assert before is not None
    (code / "ownother.py").write_text("import os\n")
    (code / "ownloss/unused.py").write_text("import os\n")
    assert code_hash("ownloss.hinge.hinge") == before
    with (code / name).open("a") as file:
        file.write("\n# edited\n")
    forget()
    assert load() != before
    assert not [name for name in sys.modules if name.startswith(("ownlazy", "ownspace"))], "it is not imported to be hashed"


def test_installed_packages_are_not_read_but_for_that_of_the_target(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original: Callable[..., bytes] = plugins._source
    monkeypatch.setattr(plugins, "_source", lambda name, file: read.append(name) or original(name, file))
    load()
    deep = {"owndeep", "owndeep.below", "owndeep.below.inner"}  # `import owndeep.below.inner` binds the first
    imported = {"ownloss", "ownloss.hinge", "ownloss.margins", "ownhelper", "ownbelow", "ownlazy.inner", "ownspace.inner.most"}
    assert set(read) == imported | deep
    read.clear()
    assert code_hash("torch.optim.RAdam") is None, "a run records its version"
    assert code_hash("halos.losses.dpo.dpo") is None
    assert code_hash("ownabsent.loss") is None
    assert read == []
    assert code_hash("omegaconf.omegaconf.OmegaConf") is not None
    assert {name.partition(".")[0] for name in read} == {"omegaconf"}


@pytest.mark.parametrize("name", ["ownloss/hinge.py", "ownhelper.py"])
def test_code_that_was_edited_after_its_import_is_refused(name: str, code: Path) -> None:
    before, path = load(), code / name
    text = path.read_text()
    path.write_text(text + "\n# edited\n")
    with pytest.raises(UserError, match=rf"^{path} has been edited since this process imported it: start a new process"):
        load()
    path.write_text(text)
    assert load() == before
    path.write_text(text + "\n# edited\n")
    importlib.reload(sys.modules[name.removesuffix(".py").replace("/", ".")])
    assert load() != before, "the new code is what runs"
