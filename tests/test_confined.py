"""Files of an untrusted directory: links that lead out are refused, and sizes are limited."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from halos import confined
from halos.confined import UnreadableError
from halos.errors import LONGEST, UserError, one_line, printable, user_errors

OUTSIDE = "as it was\n"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that nobody may read or change."""
    path = tmp_path / "outside" / "canary"
    path.parent.mkdir()
    path.write_text(OUTSIDE)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    (path / "attempts").mkdir(parents=True)
    (path / "checkpoints" / "step-00000002" / "model").mkdir(parents=True)
    (path / "train.log").write_text("begun\n")
    return path


def chain(path: Path, target: Path) -> None:
    between = path.with_name("between")
    between.symlink_to(target)
    path.symlink_to(between)


def listening(path: Path) -> None:
    """A socket's name may have 107 characters."""
    made = socket.socket(socket.AF_UNIX)
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        made.bind(path.name)
    finally:
        os.chdir(before)
        made.close()


LEAVING: dict[str, Callable[[Path, Path], object]] = {  # what is planted at a path, given the canary
    "a link to a file": lambda path, outside: path.symlink_to(outside),
    "a link to a directory": lambda path, outside: path.symlink_to(outside.parent),
    "a relative link": lambda path, outside: path.symlink_to(os.path.relpath(outside, path.parent)),
    "a dangling link": lambda path, outside: path.symlink_to(outside.with_name("not there yet")),
    "a link to a link": chain,
    "a link to a device": lambda path, outside: path.symlink_to("/dev/full"),
    "a link to the root": lambda path, outside: path.symlink_to("/"),
    "a link to a neighbour whose name begins alike": lambda path, outside: path.symlink_to(outside.parents[1] / "run-too"),
    "a link to its own run": lambda path, outside: path.symlink_to(path.parent),
    "a pipe": lambda path, outside: os.mkfifo(path),
    "a socket": lambda path, outside: listening(path),
}


@pytest.mark.parametrize("plant", LEAVING.values(), ids=LEAVING)
@pytest.mark.parametrize("name", ["evil", "train.rank1.log", "checkpoints/step-00000002/model/\x1b[31mevil\nerror: forged"])
def test_what_leads_out_of_a_directory_is_refused_by_name(
    root: Path, outside: Path, plant: Callable[[Path, Path], object], name: str
) -> None:
    path = root / name
    plant(path, outside)
    if path.is_symlink() and path.parent == path.resolve() != root:
        return  # a link within the run, which leads nowhere else
    with pytest.raises(UserError) as refused:
        confined.inspect(root)
    assert one_line(path.name)[:20] in str(refused.value) or "between" in str(refused.value)
    assert "\x1b" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert outside.read_text() == OUTSIDE
    assert os.listdir(outside.parent) == ["canary"]


def test_hard_links_to_append_only_files_are_refused_and_to_others_allowed(root: Path, outside: Path) -> None:
    weights = outside.with_name("weights.safetensors")
    weights.touch()
    (root / "checkpoints" / weights.name).hardlink_to(weights)  # rounds share weights so
    confined.inspect(root)
    (root / "metrics.jsonl").hardlink_to(outside)
    with pytest.raises(UserError, match=r"metrics\.jsonl has a second name"):
        confined.inspect(root)
    with pytest.raises(UserError, match="second name"):
        confined.append(root / "metrics.jsonl", "more")
    assert outside.read_text() == OUTSIDE


def test_a_directory_may_be_reached_through_a_link_and_have_links_within(root: Path, tmp_path: Path) -> None:
    (root / "wandb").mkdir()
    (root / "wandb" / "latest.log").symlink_to("../train.log")
    (tmp_path / "scratch").symlink_to(root)
    confined.inspect(tmp_path / "scratch")
    confined.append(tmp_path / "scratch" / "train.log", "more\n", within=tmp_path / "scratch")
    assert (root / "train.log").read_text() == "begun\nmore\n"


@pytest.mark.parametrize("plant", LEAVING.values(), ids=LEAVING)
def test_nothing_is_appended_read_or_copied_through_a_link_that_leads_out(
    root: Path, outside: Path, plant: Callable[[Path, Path], object]
) -> None:
    path = root / "evil.log"
    plant(path, outside)
    with pytest.raises(UserError):
        confined.append(path, "more", within=root)
    with pytest.raises(UserError):
        confined.read_bytes(path, within=root)
    with pytest.raises(UserError):
        confined.copy(path, root / "copied", within=root)
    confined.write_whole(path, "mine\n", within=root)  # takes its place
    assert path.read_text() == "mine\n"
    assert not path.is_symlink()
    assert outside.read_text() == OUTSIDE
    assert os.listdir(outside.parent) == ["canary"]


def test_nothing_is_written_in_a_directory_that_is_a_link(root: Path, outside: Path) -> None:
    (root / "rollouts").symlink_to(outside.parent)
    (outside.parent / "deeper").mkdir()
    for write in (confined.append, confined.write_whole):
        for place in (root / "rollouts", root / "rollouts" / "deeper"):
            with pytest.raises(UserError, match="rollouts is a link that leaves"):
                write(place / "rows", "more", within=root)
    with pytest.raises(UserError, match="rollouts is a link that leaves"):
        confined.read_bytes(root / "rollouts" / outside.name, within=root)
    confined.remove(root / "rollouts")
    assert outside.read_text() == OUTSIDE
    assert sorted(os.listdir(outside.parent)) == ["canary", "deeper"]
    assert os.listdir(outside.parent / "deeper") == []


def test_a_link_that_waits_for_a_hidden_name_is_not_followed(root: Path, outside: Path) -> None:
    (root / f".result.json.{os.getpid()}").symlink_to(outside)
    confined.write_whole(root / "result.json", "{}", within=root)
    assert (root / "result.json").read_text() == "{}"
    assert outside.read_text() == OUTSIDE


BAD_JSON = {
    "nothing": "", "half": '{"a": 1', "a list in a list": "[" * 100_000, "an object in an object": '{"a":' * 100_000,
    "a long number": f'{{"a": {"9" * 5000}}}', "half of a character": r'{"a": "\ud800"}', "a list": "[]", "a number": "5",
    "not a number": "{]", "two": "{} {}",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON)
def test_a_file_that_is_no_object_is_refused_in_one_message(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UnreadableError, match=r"a\.json") as refused:
        confined.load_object(path)
    assert len(str(refused.value)) < 800
    assert "\n" not in str(refused.value)


BAD_YAML = {
    "a tag": "a: !!python/object/apply:os.system ['touch pwned']", "a tag of ours": "!!python/name:os.system {}",
    "aliases without end": "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)),
    "itself": "&a [*a]", "a list in a list": "[" * 5000, "too long": "a: " + "x" * 2**20, "no text": "a: \x00",
    "an alias of nothing": "a: *b", "two documents": "a: 1\n---\nb: 1",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD_YAML.values(), ids=BAD_YAML)
def test_yaml_makes_no_objects_and_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnreadableError, match=r"config\.yaml"):
        confined.parse_yaml(text, "config.yaml")
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_larger_than_any_of_its_kind_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole
    with pytest.raises(UnreadableError, match="larger than"):
        confined.read_bytes(path)
    with pytest.raises(UnreadableError, match=r"a device"):
        confined.read_bytes(Path("/dev/zero"))


def test_an_append_on_a_full_disk_leaves_no_partial_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    confined.append(path, "whole\n")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        confined.append(path, "half of a li", sync=True)
    assert path.read_text() == "whole\n"


def test_only_a_regular_file_with_enough_room_is_overwritten_in_place(tmp_path: Path, outside: Path) -> None:
    reserve = tmp_path / "reserve"
    reserve.write_text(" " * 64)
    before = reserve.stat()
    assert confined.overwrite_in_place(reserve, '{"status": "failed"}\n')
    assert (reserve.stat().st_ino, reserve.stat().st_size) == (before.st_ino, 64), "no new room is asked for"
    assert json.loads(reserve.read_text()) == {"status": "failed"}
    assert not confined.overwrite_in_place(reserve, "x" * 65)
    assert not confined.overwrite_in_place(tmp_path / "none", "x")
    for plant in (Path.hardlink_to, Path.symlink_to):
        reserve.unlink()
        plant(reserve, outside)
        assert not confined.overwrite_in_place(reserve, "mine\n")
    assert outside.read_text() == OUTSIDE


def test_errors_of_libraries_become_one_line_that_names_the_action() -> None:
    for error in (ValueError("first\nsecond"), RecursionError(), KeyError("a"), MemoryError(), OSError(5, "I/O"), EOFError()):
        with pytest.raises(UserError, match=r"^reading x: .+; mend it$") as told, user_errors("reading x", "mend it"):
            raise error
        assert "second" not in str(told.value)
        assert "\n" not in str(told.value)
    for error, words in ((KeyError("a"), "KeyError: 'a'"), (ValueError("x" * 9999), "x" * LONGEST + " ...")):
        with pytest.raises(UserError) as told, user_errors("reading x"):
            raise error
        assert str(told.value) == f"reading x: {words}"
    with pytest.raises(UserError, match=r"^mine$"), user_errors("reading x"):
        raise UserError("mine")
    with pytest.raises(KeyboardInterrupt), user_errors("reading x"):
        raise KeyboardInterrupt
    panic = type("PanicException", (BaseException,), {})  # what Rust's panics arrive as
    with pytest.raises(UserError, match="reading x: it broke"), user_errors("reading x"):
        raise panic("it broke")


def test_untrusted_text_cannot_forge_a_line_or_control_the_terminal() -> None:
    name = "a\x1b]0;title\x07\rb\ud800\u202ec\u2028d"
    assert printable(name) == r"a\x1b]0;title\x07\rb\ud800\u202ec\u2028d"
    assert one_line("a\nb") == r"a\nb"
    assert printable("a\nb\té…\u200d") == "a\nb\té…\u200d"


def test_yaml_is_written_in_order_and_read_as_it_was() -> None:
    value = {
        "z": 1,
        "a": [None, True, 1e-6, 2.0, "1", "no", "a: b", "zwei\nZeilen", "naïve 👍", " blank "],
        "é": {},
        "": [],
        "long": "x " * 400,
    }
    text = confined.to_yaml(value)
    assert confined.parse_yaml(text, "a.yaml") == value
    assert list(confined.parse_yaml(text, "a.yaml")) == list(value)
    assert "naïve" in text, "as it is typed"
    assert "caf" in confined.to_yaml({"data": "caf\udce9.jsonl"}), "a file's name that is no UTF-8"
    assert max(map(len, text.splitlines())) > 700, "a value is on one line"
