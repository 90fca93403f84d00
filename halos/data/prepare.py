"""Tokenise the entries of data.train or data.eval once, and cache the data set under a hash of its content."""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from halos import examples
from halos.config.plugins import code_hash
from halos.confined import expanded
from halos.data import oddities
from halos.data.dataset import CUT_COMPLETIONS, CUT_TURNS, Counts, Writer, is_whole
from halos.data.formats import as_kind, parse
from halos.data.oddities import EndTokens
from halos.data.sources import OpenSource, Source, hash_files, open_source
from halos.data.template import chat_template
from halos.data.tokenize import EQUAL, Encoded, Encoder
from halos.errors import UserError
from halos.examples import Example, Item, Judgement

log = logging.getLogger(__name__)

BATCH = 1000  # rows tokenised in one call, and written as one arrow batch
LEFT_OUT = "left out by data.format"
UNDESIRABLE = "undesirable, not to be imitated"


def prepare(
    entries: Sequence[str | Mapping[str, Any]],
    *,
    kind: type[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation: str,
    score: str,
    cache_dir: Path,
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
    settings = [kind.__name__, max_length, truncation, score, transform_key, code, [each.fingerprint for each in opened]]
    key = _key([settings, [asdict(each.source) for each in opened], purpose, _code(), *_tokenizer(tokenizer)])
    path = expanded(cache_dir) / "data" / key
    if is_whole(path, expanded(cache_dir)):
        return path
    hidden = path.with_name(f".{key}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            if is_whole(path, expanded(cache_dir)):
                return path
            if path.exists():
                log.warning("%s is damaged: it is written again", path)
                shutil.rmtree(path)
            hidden.mkdir()
            encoder = Encoder(tokenizer, max_length=max_length, truncation=truncation)
            _write(hidden, opened, kind, score, encoder, EndTokens.of(tokenizer, max_length), transform)
            _publish(hidden, path)
    except OSError as error:
        raise UserError(f"cache_dir={cache_dir}: the tokenised rows cannot be written there: {error}") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return path


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


def _publish(hidden: Path, path: Path) -> None:
    """Rename the complete directory into place; if another process was first, its result is as good."""
    try:
        hidden.rename(path)
    except OSError:
        if not is_whole(path):
            raise


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


def _write(
    directory: Path,
    opened: Sequence[OpenSource],
    kind: type[Example],
    score: str,
    encoder: Encoder,
    ends: EndTokens,
    transform: Callable[[Any], Example] | None,
) -> None:
    report, written_kind = [], kind
    bar = tqdm(desc="tokenising", unit=" rows", delay=2, disable=None, leave=False)
    with bar, closing(Writer(directory)) as writer:
        for number, source in enumerate(opened):
            counts = Counts(source.source.path, files=source.files)
            report.append(counts)
            examples = _examples(source, kind, score, counts, transform, bar)
            while batch := list(islice(examples, BATCH)):
                written_kind = type(batch[0][0])
                items = _items(batch, encoder, ends, counts)
                writer.write([(item, number) for item in items])
            if not counts.kept:
                raise UserError(f"{counts.line()}: none of them can be used")
        weights = [each.source.weight for each in opened]
        writer.finish({"kind": written_kind.__name__, "weights": weights, "report": [asdict(counts) for counts in report]})


NamedExample = tuple[Example, str, str]  # the example, the position of its row, and its id


def _examples(
    opened: OpenSource,
    kind: type[Example],
    score: str,
    counts: Counts,
    transform: Callable[[Any], Example] | None,
    bar: tqdm,
) -> Iterator[NamedExample]:
    for row in opened.rows():
        counts.rows += 1
        bar.update()
        if row.left_out:
            counts.examples += 1
            counts.drop(row.note or LEFT_OUT, row.where)
            continue
        parsed = parse(row, score=score)
        counts.read_as(parsed.notes)
        if (example := parsed.example) is None:
            counts.examples += 1
            counts.drop(parsed.dropped, row.where)
            continue
        oddities.count_split(row.original or row.record, counts)
        for oddity in oddities.of_example(example):
            counts.note(oddity, row.where)
        converted = as_kind(example, kind, row)
        if not converted:
            counts.examples += 1
            counts.drop(UNDESIRABLE if isinstance(example, Judgement) else EQUAL, row.where)
        for number, each in enumerate(converted):
            counts.examples += 1
            yield transform(each) if transform else each, row.where, f"{row.where}#{number}"


def _items(batch: Sequence[NamedExample], encoder: Encoder, ends: EndTokens, counts: Counts) -> list[Item]:
    items = []
    for encoded, (example, where, name) in zip(encoder.encode([(each, where) for each, where, _ in batch]), batch, strict=True):
        if isinstance(encoded, str):
            counts.drop(encoded, where)
            continue
        _count(encoded, where, counts)
        if oddity := ends.missing(encoded, example):
            counts.note(oddity, where)
        items.append(Item(encoded.prompt, encoded.completions, name, example.numbers(), encoded.logps))
    return items


def _count(encoded: Encoded, where: str, counts: Counts) -> None:
    counts.kept += 1
    for shortened, what in ((encoded.cut_turns, CUT_TURNS), (encoded.cut_completions, CUT_COMPLETIONS)):
        if shortened:
            counts.remember(what, where)
    counts.cut_turns += encoded.cut_turns
    counts.cut_completions += encoded.cut_completions
    counts.inexact += not encoded.exact
    counts.merged += encoded.merged
    counts.tokenised_anew += encoded.tokenised_anew
