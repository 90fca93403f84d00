"""Read rows of json and jsonl files, a line or an element at a time."""

import json
import re
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import IO, Any

from halos.data.readers.streams import not_utf8, opened, opened_text
from halos.data.row import UNKNOWN_OFFSET, End, Row, row_of, type_name
from halos.errors import UserError, first_line_of

_NOT_BLANK = re.compile(r"[^ \t\r\n]")
CHUNK = 1 << 20  # characters read at once
LONGEST_TOKEN = 12  # characters of a token of JSON that is no text, such as -Infinity, which the end of a chunk may cut


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a name that occurs twice: all but the last of its values would be lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object names {next(name for name in names if names.count(name) > 1)!r} twice")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_jsonl(path: Path) -> Iterator[Row]:
    """Read one object per line, skipping blank lines."""
    with opened(path) as lines:
        for value, where, _, _ in _values(path, lines, 0, 0):
            yield row_of(value, where)


def read_jsonl_after(path: Path, end: End) -> Iterator[Row]:
    """Read the rows of a file that is not compressed after the line that ends there, each with its own end."""
    offset = end.offset
    with opened(path) as lines:
        if offset == UNKNOWN_OFFSET:
            offset = sum(map(len, islice(lines, end.line)))
        elif offset:
            lines.seek(offset)
        for value, where, *place in _values(path, lines, offset, end.line):
            yield row_of(value, where)._replace(end=End(end.file, *place))


def _values(path: Path, lines: IO[bytes], offset: int, before: int) -> Iterator[tuple[Any, str, int, int]]:
    """Yield what each line that is not blank holds, its place, and where it ends, in bytes and lines. The first begins after
    `offset` bytes and `before` lines."""
    for number, line in enumerate(lines, before + 1):
        offset += len(line)
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
        except UnicodeDecodeError as error:
            raise not_utf8(path, number, line) from error
        try:
            value = _DECODER.decode(text)
            _refuse_lone_surrogates(value, text)
        except (ValueError, RecursionError) as error:
            raise _invalid(error, where) from error
        yield value, where, offset, number


def _invalid(error: Exception, where: str) -> UserError:
    """Return whatever Python's decoder raises as an error that names the row."""
    if isinstance(error, json.JSONDecodeError):
        return UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}")
    if isinstance(error, UnicodeEncodeError):
        return UserError(f"{where}: holds a lone surrogate, half of a character, such as \\ud800")
    if isinstance(error, RecursionError):
        return UserError(f"{where}: not valid JSON: lists or objects are nested too deeply")
    return UserError(f"{where}: not valid JSON: {first_line_of(error).partition(';')[0]}")  # too many digits, or a name twice


def _refuse_lone_surrogates(value: Any, text: str) -> None:
    """Raises UnicodeEncodeError for half of a character in a value that was read from `text`: no tokenizer takes it."""
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()


def read_json(path: Path) -> Iterator[Row]:
    """Read a list of objects, or one object per line, which many a .json file really holds, a part of the file at a time."""
    with opened_text(path) as file:
        text = _Window(file, path)
        if text.next_char() == "[":
            text.at += 1
            yield from _elements(text)
            return
        line = text.line()
        value = text.decoded(lambda error: f"{path}:{line + error.lineno - 1}", str(path))
        several = text.next_char() != ""
    if several:
        yield from read_jsonl(path)
    elif isinstance(value, dict):
        lists = [key for key, held in value.items() if isinstance(held, list) and held and isinstance(held[0], dict)]
        held = f"its key '{lists[0]}' holds one: write that list" if lists else "write a list of such objects"
        raise UserError(f"{path}: holds one object, not a list of rows; {held} to a .json file, or one row a line to a .jsonl")
    else:
        raise UserError(f"{path}: a .json file holds a list of objects, this one {type_name(value)}")


def _elements(text: "_Window") -> Iterator[Row]:
    """Read the elements of a list, from the first on, each with the line on which it starts: `a.json:1`, and others that start
    there `a.json:1[2]`, since no two rows have one place."""
    line, number = 0, 0
    while (char := text.next_char()) != "]":
        number = number + 1 if text.line() == line else 1
        line = text.line()
        where = f"{text.path}:{line}{f'[{number}]' if number > 1 else ''}"
        value = text.decoded(lambda error, line=line: f"{text.path}:{line + error.lineno - 1}", where)
        yield row_of(value, where)
        char = text.next_char()
        if char == ",":
            text.at += 1
        elif char != "]":
            raise UserError(f"{text.path}:{text.line()}: not valid JSON: expected ',' or ']'")
    text.at += 1
    if text.next_char():
        raise UserError(f"{text.path}:{text.line()}: not valid JSON: there is text after the list")


class _Window:
    """A part of a text file: what is before `at` was read, and more is read when it is needed."""

    def __init__(self, file: TextIOWrapper, path: Path) -> None:
        self.path, self.at = path, 0
        self._file, self._text, self._decoder = file, "", _DECODER
        self._line, self._counted = 1, 0  # the line of the character at `_counted`

    def _grow(self) -> bool:
        """Read as much again as there is; False at the end of the file."""
        try:
            more = self._file.read(max(CHUNK, len(self._text)))
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not UTF-8 text") from error
        if self.at > CHUNK:
            self.line()
            self._text, self._counted, self.at = self._text[self.at :], 0, 0
        self._text += more
        return bool(more)

    def next_char(self) -> str:
        """Go to the next character that is not blank, and return it; empty at the end of the file."""
        while (match := _NOT_BLANK.search(self._text, self.at)) is None:
            self.at = len(self._text)
            if not self._grow():
                return ""
        self.at = match.start()
        return match[0]

    def line(self) -> int:
        """Return the line that `at` is on."""
        self._line, self._counted = self._line + self._text.count("\n", self._counted, self.at), self.at
        return self._line

    def decoded(self, at_error: Callable[[json.JSONDecodeError], str], where: str) -> Any:
        """Read the value that starts at `at`. Raises UserError; `at_error` names the place of an error within the value."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self.at)
                _refuse_lone_surrogates(value, self._text[self.at : end])
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - LONGEST_TOKEN
                if cut and self._grow():
                    continue
                within = json.JSONDecodeError(error.msg, self._text[self.at :], error.pos - self.at)
                raise _invalid(within, at_error(within)) from error
            except (ValueError, RecursionError) as error:
                raise _invalid(error, where) from error
            self.at = end
            return value
