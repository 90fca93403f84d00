"""A journal's lines are complete or absent, and a changed byte is detected."""

from pathlib import Path

import pytest

from halos.errors import UserError
from halos.journal import Journal


def filled(path: Path) -> Journal:
    journal = Journal(path)
    for step in (2, 4, 6):
        journal.add({"step": step, "checkpoint": f"step-{step}"})
    return journal


def test_what_was_added_is_read_in_order(tmp_path: Path) -> None:
    assert Journal(tmp_path / "none").read().rows == []
    entries = filled(tmp_path / "journal").read()
    assert ([row["step"] for row in entries.rows], entries.fault) == ([2, 4, 6], None)


def test_a_line_that_a_crash_cut_off_is_no_line_and_the_next_one_takes_its_place(tmp_path: Path) -> None:
    journal = filled(tmp_path / "journal")
    journal.path.write_bytes(journal.path.read_bytes() + b'{"step": 8, "chec')
    assert len(journal.read().rows) == 3
    journal.add({"step": 8})
    entries = journal.read()
    assert ([row["step"] for row in entries.rows], entries.fault) == ([2, 4, 6, 8], None)


def test_every_flipped_bit_shows(tmp_path: Path) -> None:
    journal = filled(tmp_path / "journal")
    content = journal.path.read_bytes()
    for at in range(len(content) - 1):  # the last byte ends the last line: without it that one was cut off
        journal.path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        assert journal.read().fault is not None, at


def test_a_line_that_was_taken_out_shows(tmp_path: Path) -> None:
    journal = filled(tmp_path / "journal")
    first, _, last = journal.path.read_text().splitlines()
    journal.path.write_text(f"{first}\n{last}\n")
    assert journal.read().fault == "line 2: contents changed"


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        Journal(tmp_path / "run" / "journal").add({"step": 1})
    assert (tmp_path / "elsewhere").read_text() == "mine\n"
