"""Tokenise the entries of data.train or data.eval once, and cache the data set under a hash of its content."""

import hashlib
import json
import logging
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from halos.config.plugins import code_hash
from halos.confined import expanded
from halos.data import cache, compose, fast_tokenizer
from halos.data.compose import Entry
from halos.data.dataset import is_whole, publish
from halos.data.held_out import Rule, divided
from halos.data.limit import NONE, Limit
from halos.data.row_tokeniser import RowTokeniser
from halos.data.shards import Shards
from halos.data.sources import OpenSource, Source, hash_files, open_source
from halos.data.template import chat_template
from halos.errors import UserError
from halos.examples import Example

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Making:
    """How rows become items: all that items depend on besides their sources."""

    kind: type[Example]  # what the loss takes, or its `transform`, of conditional SFT; `transform_key` names it
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    truncation: str
    score: str
    lost: str
    purpose: str
    transform: Callable[[Any], Example] | None
    transform_key: str
    temperature: float | None = None  # of training, where the loss learns from a teacher, whose log-probs must be of the same

    def facts(self) -> list[Any]:
        """Return what items of any max_length depend on."""
        code = code_hash(f"{self.kind.__module__}.{self.kind.__name__}")  # of the user's own type
        converts = f"{self.transform_key} {_code_of(self.transform)}"
        common = [self.kind.__name__, self.score, self.lost, converts, code, cache.code_version()]
        return [*common, *_tokenizer(self.tokenizer), *([self.temperature] if self.temperature is not None else [])]

    def key(self, opened: Sequence[OpenSource]) -> str:
        sources = [[each.fingerprint for each in opened], [asdict(each.source) for each in opened]]
        return _key([self.facts(), self.max_length, self.truncation, *sources, self.purpose])

    def entries(self, opened: Sequence[OpenSource], base: Path) -> list[Entry]:
        """Return the sources with their shards in the cache `base`."""
        tokenise, again = self.tokenisers()
        common, made = self.facts(), self.made()
        return [Entry(source, _shards_of(source, base, common, self.purpose, tokenise, made), again) for source in opened]

    def tokenisers(self) -> tuple[RowTokeniser, RowTokeniser]:
        """Return what makes items of any length, and what makes those again that are to lose turns."""
        one, other = (
            RowTokeniser(
                self.tokenizer, kind=self.kind, score=self.score, max_length=most, truncation=longer, lost=self.lost,
                transform=self.transform, temperature=self.temperature,
            )
            for most, longer in ((NONE, "error"), (self.max_length, self.truncation))
        )  # fmt: skip
        return one, other

    def limit(self) -> Limit:
        return Limit(self.tokenizer, self.max_length, self.truncation)

    def made(self) -> dict[str, Any]:
        """Return what a person wants to know of how rows were tokenised."""
        template = chat_template(self.tokenizer, None).encode(errors="surrogatepass")
        return {"tokenizer": str(self.tokenizer.name_or_path), "template": hashlib.blake2b(template, digest_size=4).hexdigest(),
                "code": cache.code_version()}  # fmt: skip


def prepare(
    entries: Sequence[str | Mapping[str, Any]],
    *,
    kind: type[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation: str,
    score: str,
    cache_dir: Path,
    lost: str = "error",
    purpose: str = "train",
    transform: Callable[[Any], Example] | None = None,
    transform_key: str = "",
    temperature: float | None = None,
    rule: Rule | None = None,
    train: Sequence[str | Mapping[str, Any]] = (),
) -> Path:
    """Return the directory below `cache_dir` with the tokenised rows, which the first call writes.

    `purpose` (train or eval) is the split of entries that name none. By `rule` rows of training data are held out: for evaluation
    those of the entries `train` are added. Call it on one rank; the others open what it returns.
    """
    opened = _opened(entries, kind, purpose, rule, train, score)
    making = Making(kind, tokenizer, max_length, truncation, score, lost, purpose, transform, transform_key, temperature)
    base = expanded(cache_dir)
    path = base / cache.DATA / making.key(opened)
    cache.keep(path)
    if not is_whole(path, base):
        parts, made = making.entries(opened, base), {**making.made(), "max_length": max_length}
        try:
            make(path, lambda directory: compose.write(directory, parts, making.limit(), made), base)
        except OSError as error:
            raise UserError(f"cache_dir={cache_dir}: the tokenised rows cannot be written there: {error}") from error
    cache.touch(path)
    return path


def _opened(
    entries: Sequence[Any], kind: type[Example], purpose: str, rule: Rule | None, train: Sequence[Any], score: str
) -> list[OpenSource]:
    """Open the entries, without the rows that are held out, or with those of training data."""
    if not entries and not train:
        raise UserError(f"data.{purpose}: no entry; give files, directories or names")
    opened = [open_source(Source.of(entry), kind, purpose) for entry in entries]
    if rule is None:
        return opened
    if purpose == "train":
        return divided(opened, rule, score=score, held_out=False)
    of_train = [open_source(Source.of(entry), kind, "train") for entry in train]
    return [*opened, *divided(of_train, rule, score=score, held_out=True)]


def make(path: Path, write: Callable[[Path], None], base: Path | None, *, part: Path | None = None) -> None:
    """Let `write` fill a directory that becomes `path`; it is complete, or not there. `part` of the cache is locked meanwhile, or
    `path`; with `base`, the cache_dir, it keeps the hash of the rows."""
    hidden = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(part or path):
            if is_whole(path, base):
                return
            if path.exists():
                log.warning("%s is damaged: it is written again", path)
                shutil.rmtree(path)
            hidden.mkdir()
            write(hidden)
            publish(hidden, path)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one of several runs that need the same rows (such as jobs of a sweep) tokenise them while the others wait."""
    locks = path.parent.with_name(cache.LOCKS)
    locks.mkdir(exist_ok=True)
    lock = FileLock(locks / f"{path.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another run is tokenising the same rows: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _shards_of(
    source: OpenSource, base: Path, common: Sequence[Any], purpose: str, tokenise: RowTokeniser, made: Mapping[str, Any]
) -> Shards:
    """Return the shards of a source, by a hash of all that its items depend on: not its weight, nor its place on this disk."""
    place = expanded(source.source.path)
    irrelevant = {"weight", "count", "epochs", "name", *(["path"] if place.exists() else [])}
    entry = {name: value for name, value in asdict(source.source).items() if name not in irrelevant}
    key = _key([common, source.fingerprint, entry, purpose])
    about = {"source": source.source.path, "made": made}
    return Shards(base / cache.SHARDS / key, str(place) if place.exists() else "", tokenise, base, about)


def _code_of(transform: Callable[[Any], Example] | None) -> str:
    """Hash the module of a loss's function, also of one of this package: `transform_key` has the code of the user's alone."""
    function = getattr(transform, "func", transform)
    file = getattr(sys.modules.get(getattr(function, "__module__", None) or ""), "__file__", None)
    return hash_files([Path(file)]) if file else ""


def _key(parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return everything about the tokenizer that decides the ids of a row."""
    tokenizer("", padding=False, truncation=False)  # the state of earlier calls would be part of the backend's description
    backend = hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    special = json.dumps({**named, "split_special_tokens": tokenizer.split_special_tokens}, sort_keys=True)
    versions = [tokenizers.__version__, transformers.__version__, *filter(None, [fast_tokenizer.version()])]
    return [backend, special, chat_template(tokenizer, None), *versions]
