"""Tokenise the entries of data.train or data.eval once, and cache the data set under a hash of its content."""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from halos import examples
from halos.config.plugins import code_hash
from halos.confined import expanded
from halos.data.dataset import Counts, Writer, is_whole, publish
from halos.data.progress import Progress
from halos.data.row_tokeniser import BATCH, RowTokeniser
from halos.data.shards import Shards, in_chunks
from halos.data.sources import OpenSource, Source, hash_files, open_source
from halos.data.template import chat_template
from halos.errors import UserError
from halos.examples import Example, Item

log = logging.getLogger(__name__)


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
) -> Path:
    """Return the directory below `cache_dir` with the tokenised rows, which the first call writes.

    `kind` is the example type that the loss takes, or its `transform` (of conditional SFT; `transform_key` names it).
    `purpose` (train or eval) is the split of entries that name none. Call it on one rank; the others open what it returns.
    """
    if not entries:
        raise UserError(f"data.{purpose}: no entry; give files, directories or names")
    opened = [open_source(Source.of(entry), kind, purpose) for entry in entries]
    code = code_hash(f"{kind.__module__}.{kind.__name__}")  # of an example type of the user's own
    common = [kind.__name__, max_length, truncation, score, lost, transform_key, code, _code(), *_tokenizer(tokenizer)]
    key = _key([common, [each.fingerprint for each in opened], [asdict(each.source) for each in opened], purpose])
    base = expanded(cache_dir)
    path = base / "data" / key
    if not is_whole(path, base):
        tokenise = RowTokeniser(
            tokenizer, kind=kind, score=score, max_length=max_length, truncation=truncation, lost=lost, transform=transform
        )
        shards = {number: _shards_of(source, base, common, purpose, tokenise) for number, source in enumerate(opened)}
        try:
            _make(path, lambda directory: _write(directory, opened, tokenise, shards), base)
        except OSError as error:
            raise UserError(f"cache_dir={cache_dir}: the tokenised rows cannot be written there: {error}") from error
    return path


def _make(path: Path, write: Callable[[Path], None], cache: Path) -> None:
    """Let `write` fill a directory that becomes `path`; it is complete, or not there."""
    hidden = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(path):
            if is_whole(path, cache):
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
    locks = path.parent.with_name("locks")  # a directory of their own, since they are never deleted
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


def _shards_of(source: OpenSource, base: Path, common: Sequence[Any], purpose: str, tokenise: RowTokeniser) -> Shards:
    """Return the shards of a source, by a hash of all that its items depend on: not its weight, nor its place on this disk."""
    place = expanded(source.source.path)
    irrelevant = {"weight", "path"} if place.exists() else {"weight"}
    entry = {name: value for name, value in asdict(source.source).items() if name not in irrelevant}
    key = _key([common, source.fingerprint, entry, purpose])
    return Shards(base / "shards" / key, str(place) if place.exists() else "", tokenise, base)


def _key(parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _code() -> str:
    """Hash the code of this package and of examples.py: any change of it invalidates the cache."""
    return hash_files([*sorted(Path(__file__).parent.rglob("*.py")), Path(examples.__file__)])


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return everything about the tokenizer that decides the ids of a row."""
    tokenizer("", padding=False, truncation=False)  # the state of earlier calls would be part of the backend's description
    backend = hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    special = json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return [backend, special, chat_template(tokenizer, None), tokenizers.__version__, transformers.__version__]


# --- the rows ----------------------------------------------------------------------------------------------------------


def _write(directory: Path, opened: Sequence[OpenSource], tokenise: RowTokeniser, shards: Mapping[int, Shards]) -> None:
    report, kind, progress = [], tokenise.kind.__name__, Progress()
    with progress, closing(Writer(directory)) as writer:
        for number, source in enumerate(opened):
            counts = Counts(source.source.path, files=source.files)
            report.append(counts)
            for written, items in _batches(source, counts, tokenise, shards[number]):
                kind = written
                writer.write([(item, number) for item in items])
                progress.reach(source.source.path, sum(each.rows for each in report))
            if not counts.kept:
                raise UserError(f"{counts.line()}: none of them can be used")
        weights = [each.source.weight for each in opened]
        writer.finish({"kind": kind, "weights": weights, "report": [asdict(counts) for counts in report]})


def _batches(source: OpenSource, counts: Counts, tokenise: RowTokeniser, shards: Shards) -> Iterator[tuple[str, list[Item]]]:
    """Yield the items of a source with the name of their type: of its shards where it has more rows than one of them."""
    known = shards.known()
    if known is None:
        chunks = in_chunks(source.rows())
        first, second = next(chunks, []), next(chunks, [])
        if not second:
            yield from ((kind.__name__, items) for kind, items in tokenise.batches(first, counts))
            return
        known = shards.made(chain([first, second], chunks))
    for shard in known:
        more, kind, items = shards.read(shard)
        counts.add(more)
        yield kind, []
        while batch := list(islice(items, BATCH)):
            yield kind, batch
