"""Token ids of much text: by fastokens, several times as fast as the tokenizers library, where it is proved to give the same."""

import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from itertools import chain, pairwise, product
from typing import Any
from zlib import crc32

import numpy as np
import psutil
import tokenizers
from tokenizers import Tokenizer

from halos.errors import UserError

log = logging.getLogger(__name__)

LIBRARY = "fastokens"
STARTS_AT = 2_000_000  # characters that the tokenizers library gets first: loading and proving the other takes a second
RENEWED_AFTER = 20_000_000  # characters, from which on it is loaded anew where it has grown: it remembers all words
MOST_GROWTH = 150_000_000  # bytes of this process; words of random text take 10 bytes a character
CHECKED = 64  # one text of so many, by its content, is tokenised by both: a text that tells stays one that does
MOST_ADDED = 300  # added tokens that the proof uses
# the proof has every character of these blocks, and every sixteenth of others: CJK, Hangul, ancient scripts, whose are alike
_EACH = (range(0x3400), range(0xF900, 0x10000), range(0x1F000, 0x1FB00))
_OF_ENGINES = re.compile(r"\\\\[bBdDwW]")  # in JSON
_BLANKS = (" ", "\n", "\t", "\r\n", "\u00a0", "\u3000", " \n", "\n ")
_ODD = (
    "I'm we'LL DON'T you'd 'tis don’t rock'n'roll O'Neill's CamelCaseHTTPServer snake_case_ID x2y",
    "3.14159, 1,000,000; 0x7fff 1e-5 №5 ½²³ Ⅳ ١٢٣ १२३" + "1234567890" * 5,
    "def f(x):\n    return {'a': [x**2, ~x], \"b\": x != 0}  # c\n\n\n\tend;\r\n",
    "https://a.b/c?d=e&f=%20#g user@host.org --flag=1 C:\\d",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽 e\u0301 é ﬁ Å \u212b ǆ ß ẞ İ ı",
    "\x00\x01\x7f\ufeff\u200b\u200d\u2028\ufffd\U0010ffff",
    "▁a ▁▁b Ġc Ċ <0x0A> </w> ##d",
    "你好，世界。안녕하세요 สวัสดี مرحبا שלום नमस्ते Привет こんにちは",
    *("a" * 5000, "ab " * 2000, "-" * 300 + "=" * 300, ""),
)


class FastTokenizer:
    """The ids that a tokenizer of the tokenizers library gives to whole texts, without special tokens added.

    After STARTS_AT characters fastokens gives them, if it is installed and gives the same ids to texts of every script and to the
    user's own; one text of CHECKED stays a proof.
    """

    def __init__(self, backend: Tokenizer) -> None:
        """`backend` neither truncates nor pads."""
        self._backend = backend
        self._fast: _Fast | None = None
        self._is_tried = False
        self._characters = 0  # since it was loaded, or before
        self._resident = 0  # bytes of this process when it was loaded

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Raises UserError where fastokens, which was proved equal before, gives other ids."""
        self._characters += sum(map(len, texts))
        if not self._is_tried and self._characters > STARTS_AT:
            self._fast, self._is_tried, self._characters = self._proved(texts), True, 0
            self._resident = _resident()
        if self._fast is None:
            return self._by_library(texts)
        if self._characters > RENEWED_AFTER:
            self._characters, resident = 0, _resident()
            if resident - self._resident > MOST_GROWTH:
                self._fast, self._resident = _Fast(self._backend), resident
        ids = self._ids(self._fast, texts)
        self._check(texts, ids)
        return ids

    def _by_library(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _ids(self, fast: "_Fast", texts: Sequence[str]) -> list[list[int]]:
        return self._completed(texts, fast.ids(texts))

    def _completed(self, texts: Sequence[str], given: Sequence[list[int] | None]) -> list[list[int]]:
        failed = [number for number, ids in enumerate(given) if ids is None]
        others = dict(zip(failed, self._by_library([texts[number] for number in failed]), strict=True)) if failed else {}
        return [others[number] if ids is None else ids for number, ids in enumerate(given)]

    def _proved(self, texts: Sequence[str]) -> "_Fast | None":
        if not version():
            return None
        if (pattern := _OF_ENGINES.search(_patterns(self._backend))) is not None:
            log.info(
                "%s is not used: engines of regular expressions differ on %s, which this tokenizer has", LIBRARY, pattern[0][1:]
            )
            return None
        try:
            fast = _Fast(self._backend)
        except Exception as error:  # whatever it does not know: kinds of models, patterns, normalisers; or it is another version
            log.info("%s is not used: %s", LIBRARY, error)
            return None
        proof = [*hard_texts(), *_with_added_tokens(self._backend), *texts]
        given = fast.ids(proof)
        if sum(ids is None for ids in given) > len(given) / 2:
            log.info("%s is not used: it takes few texts with this tokenizer", LIBRARY)
            return None
        other = _first_difference(proof, self._completed(proof, given), self._by_library(proof))
        if other is None:
            return fast
        log.warning("%s is not used: to %r it gives other token ids than the tokenizers library", LIBRARY, other[:60])
        return None

    def _check(self, texts: Sequence[str], ids: Sequence[list[int]]) -> None:
        numbers = [number for number, text in enumerate(texts) if crc32(text.encode()) % CHECKED == 0]
        checked, given = [texts[number] for number in numbers], [ids[number] for number in numbers]
        if checked and (other := _first_difference(checked, given, self._by_library(checked))) is not None:
            raise UserError(
                f"{LIBRARY} {version()} gives other token ids than tokenizers {tokenizers.__version__} to {other[:60]!r}:"
                f" remove it (pip uninstall {LIBRARY}) and start again; rows that it has tokenised are not used then"
            )


class _Fast:
    """fastokens, with the settings of a tokenizer. Raises what it raises where it does not know one."""

    def __init__(self, backend: Tokenizer) -> None:
        from fastokens import Tokenizer as Fast  # imported where there is much text

        self._splits = bool(backend.encode_special_tokens)
        with _panics():
            self._encode: Callable[..., Any] = Fast.from_json_str(backend.to_str()).encode_batch_flat

    def ids(self, texts: Sequence[str]) -> list[list[int] | None]:
        """Return the ids of each text; None for one that it cannot take, such as one with a byte that no token has."""
        try:
            with _panics():
                data, bounds = self._encode(list(texts), add_special_tokens=False, split_special_tokens=self._splits)
        except Exception as error:
            log.debug("%s: %s", LIBRARY, error)
            half = len(texts) // 2
            return [*self.ids(texts[:half]), *self.ids(texts[half:])] if half else [None]
        ids, ends = np.frombuffer(data, np.uint32).tolist(), np.frombuffer(bounds, np.uint64).tolist()
        return [ids[start:end] for start, end in pairwise(ends)]


def _resident() -> int:
    return psutil.Process().memory_info().rss


@contextmanager
def _panics() -> Iterator[None]:
    """Make an Exception of a panic of Rust, which is none."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from error


def version() -> str:
    """Return the version of fastokens; empty where it is not installed."""
    try:
        return metadata.version(LIBRARY)
    except metadata.PackageNotFoundError:
        return ""


def hard_texts() -> Iterator[str]:
    """Yield texts on which tokenizers differ: characters of every script alone, apart, after blanks and between others, runs of
    blanks, digits, contractions, code, marks."""
    numbers = chain(*_EACH, range(0, 0x110000, 16))
    letters = [letter for letter in map(chr, numbers) if unicodedata.category(letter) not in ("Cn", "Cs", "Co")]
    for some in (letters[start : start + 64] for start in range(0, len(letters), 64)):
        yield from (
            "".join(some),
            " ".join(some),
            "x1".join(some),
            "".join(f"  {letter}- {letter}'s\n{letter} " for letter in some),
        )
    for blank in _BLANKS:
        yield from (f"a{blank * times}b{blank * times}" for times in (1, 2, 3, 4, 5, 8, 15, 40))
    yield from _ODD


def _with_added_tokens(backend: Tokenizer) -> Iterator[str]:
    """Yield texts with each added token, and with those that overlap one that is found in normalised text, or only there."""
    added = list(backend.get_added_tokens_decoder().values())[:MOST_ADDED]
    for token in (each.content for each in added):
        yield f"a{token}b  {token} {token}{token}\n{token}\n\n x"
    kinds = [[each.content for each in added if each.normalized is normalized] for normalized in (True, False)]
    for ones, others in (kinds, kinds[::-1]):
        for one, other in product(ones, others):
            yield from (one + other[common:] for common in range(1, len(other)) if one.endswith(other[:common]))


def _patterns(backend: Tokenizer) -> str:
    """Return what a tokenizer does before its model, as JSON."""
    description = json.loads(backend.to_str())
    return json.dumps([description["normalizer"], description["pre_tokenizer"]])


def _first_difference(texts: Sequence[str], ids: Sequence[list[int]], others: Sequence[list[int]]) -> str | None:
    return next((text for text, one, two in zip(texts, ids, others, strict=True) if one != two), None)
