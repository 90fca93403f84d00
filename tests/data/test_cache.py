"""python -m halos.data lists the cache of tokenised rows, and prunes it without taking anything from a run."""

import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from halos.data import __main__ as cli
from halos.data import cache, prune, shards
from halos.data.stored import stored
from halos.types import Comparison

from .tokenizers import jsonl, prepared, tokenizer

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Typed:
    """`typed("ls")`: the exit status, what it prints, and its message."""

    def type_in(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main([*words, "--cache-dir", str(tmp_path / "cache")])
        said = capsys.readouterr()
        return status, said.out, said.err

    return type_in


def rows(path: Path, count: int) -> str:
    return jsonl(path, [{"prompt": f"What is {n}?", "chosen": "one " * n, "rejected": "two"} for n in range(1, count + 1)])


def parts(place: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for name in ("data", "shards") for path in (place / "cache" / name).glob("*")}


def test_the_list_has_sources_rows_tokens_size_use_and_settings(
    tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD", 10)
    monkeypatch.setattr(shards, "processes", lambda: 1)
    used, place = tokenizer(), tmp_path / "cache"
    used.name_or_path = "mine"
    data = prepared([rows(tmp_path / "a.jsonl", 25), rows(tmp_path / "b.jsonl", 4)], place, kind=Comparison, tokenizer=used)
    status, said, _ = typed("ls")
    total, whole, small, source = sorted(said.splitlines(), key=lambda line: (line.split()[0], " 25 rows " in line))
    assert status == 0
    assert [line.split()[0] for line in (whole, small, source)] == ["data", "source", "source"]
    tokens = f"{int(data.lengths.sum()):,} tokens"
    assert all(text in whole for text in (" 29 rows ", tokens, "a.jsonl + ", "b.jsonl", "tokenizer mine", "max_length 200"))
    assert " 25 rows " in source
    assert " 4 rows " in small
    assert "max_length" not in source
    assert "unusable" not in said
    assert total.startswith("3 in all, ")
    template = [line.partition("template ")[2][:8] for line in (whole, source)]
    assert template[0] == template[1] != ""
    (made,) = (each for each in stored(place) if each.kind == "data set")
    assert made.size == sum(file.stat().st_size for file in made.path.iterdir())
    os.utime(made.path / "meta.json", (0, 0))
    assert "1970" in typed("ls")[1]
    prepared([rows(tmp_path / "a.jsonl", 25), rows(tmp_path / "b.jsonl", 4)], place, kind=Comparison, tokenizer=used)
    assert "1970" not in typed("ls")[1], "it is used again"


def test_parts_go_by_age_size_and_use_and_only_when_told_to(
    tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "cache"
    for n in range(3):
        prepared(rows(tmp_path / f"{n}.jsonl", 20), place, kind=Comparison)
        for file in (file for file in place.rglob("*") if file.is_file() and time.time() - file.stat().st_mtime < 3600):
            os.utime(file, (time.time() - (3 - n) * 86400,) * 2)  # three days ago, two, one
    gc.collect()  # nobody reads them any more
    before = parts(tmp_path)
    by_age = {n: {f"{each.path.parent.name}/{each.key}" for each in stored(place) if each.sources[0].endswith(f"{n}.jsonl")}
              for n in range(3)}  # fmt: skip
    assert [len(each) for each in by_age.values()] == [2, 2, 2], "a data set and its source"
    status, said, _ = typed("prune", "--older-than", "60h")
    assert (status, "2 would be removed" in said, "--yes removes them" in said, "0.jsonl" in said) == (0, True, True, True)
    assert parts(tmp_path) == before
    assert "2 removed" in typed("prune", "--older-than", "60h", "--yes")[1]
    assert parts(tmp_path) == before - by_age[0]
    kept = sum(each.size for each in stored(place) if each.sources[0].endswith("2.jsonl"))
    assert "2 removed" in typed("prune", "--to-size", f"{kept + 50}B", "--yes")[1]
    assert parts(tmp_path) == by_age[2], "the last used stays"
    leftover = place / "data" / f".{min(by_age[2])[5:]}-0123abcd"
    leftover.mkdir()
    assert "unfinished" in typed("prune", "--unusable", "--yes")[1]
    assert parts(tmp_path) == by_age[2]
    monkeypatch.setattr("halos.data.stored.code_version", lambda: "later")
    assert "made by another version" in typed("ls")[1]
    assert "2 removed" in typed("prune", "--unusable", "--yes")[1]
    assert not parts(tmp_path)


def test_what_a_run_reads_or_writes_stays(tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    place, path = tmp_path / "cache", rows(tmp_path / "a.jsonl", 25)
    data = prepared(path, place, kind=Comparison)
    said = typed("prune", "--to-size", "0B", "--yes")[1]
    assert "a run uses it: it stays" in said
    assert "1 removed" in said, "its shards, which are not read any more"
    assert len(data) == 25
    data = None
    gc.collect()
    assert "1 removed" in typed("prune", "--to-size", "0B", "--yes")[1]

    monkeypatch.setattr(shards, "SHARD", 10)
    monkeypatch.setattr(shards, "processes", lambda: 1)
    write, seen = shards.write_shard, []

    def pruned_meanwhile(directory: Path, *rest: object) -> None:
        write(directory, *rest)  # pyrefly: ignore
        seen.append(typed("prune", "--to-size", "0B", "--unusable", "--yes")[1])

    monkeypatch.setattr(shards, "write_shard", pruned_meanwhile)
    assert len(prepared(path, place, kind=Comparison)) == 25
    assert len(seen) == 3
    assert all("0 removed" in each and "stays" in each for each in seen)


def test_a_part_that_a_process_holds_is_free_once_it_ends(tmp_path: Path) -> None:
    part = tmp_path / "data" / "abc"
    code = (
        f"from halos.data import cache; from pathlib import Path; cache.keep(Path({str(part)!r})); print(1, flush=True); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"1\n"
    with cache.alone(part) as is_free:
        assert not is_free
    holder.kill()
    holder.wait()
    with cache.alone(part) as is_free:
        assert is_free


def test_what_a_killed_process_leaves_in_a_source_is_counted_apart_and_goes_unless_a_run_holds_the_source(
    tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD", 10)
    monkeypatch.setattr(shards, "processes", lambda: 1)
    prepared(rows(tmp_path / "a.jsonl", 25), tmp_path / "cache", kind=Comparison)
    gc.collect()
    (source,) = (tmp_path / "cache" / "shards").iterdir()
    before = {each.path: (each.rows, each.tokens, each.size) for each in stored(tmp_path / "cache")}
    leftover = source / ".000001-0123abcd"
    shutil.copytree(source / "000001", leftover)
    after = {each.path: (each.rows, each.tokens, each.size) for each in stored(tmp_path / "cache")}
    size = sum(file.stat().st_size for file in leftover.iterdir())
    assert after == {**before, leftover: (0, None, size)}
    assert [line.split()[:2] for line in typed("ls")[1].splitlines() if "unfinished" in line] == [["source", source.name[:8]]]
    held = cache.Held(source)
    assert "unfinished, but a run uses it: it stays" in typed("prune", "--unusable", "--yes")[1]
    held.close()
    assert "1 would be removed" in typed("prune", "--unusable")[1]
    assert leftover.is_dir()
    assert "1 removed" in typed("prune", "--unusable", "--yes")[1]
    assert {path.name for path in source.iterdir() if path.is_dir()} == {"000000", "000001", "000002"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("prune",), "--older-than=30d, --to-size=20GB or --unusable"),
        (("prune", "--older-than", "30"), "--older-than=30 is no age"),
        (("prune", "--to-size", "many"), "--to-size=many is no size"),
        (("ls",), "there is no such directory; --cache-dir"),
    ],
)
def test_wrong_arguments_are_one_message(words: tuple[str, ...], said: str, typed: Typed) -> None:
    status, out, message = typed(*words)
    assert (status, out) == (2, "")
    assert message.startswith("error: ")
    assert said in message


def test_help_needs_no_torch_and_rules_add_up() -> None:
    code = "import sys; from halos.data import __main__ as cli\ntry: cli.main(['prune', '--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(bool({'torch', 'transformers', 'pyarrow'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--older-than AGE" in done.stdout
    assert prune.Rule(older=0.0, size=0, unusable=True) != prune.Rule()
