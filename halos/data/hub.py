"""Rows of data sets of the hub, org/name or org/name:config, or of a directory or a file of one, hf://datasets/org/name/file.json."""

import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halos.config.suggest import nearest
from halos.data.readers.columnar import class_names, with_classes
from halos.data.readers.kinds import READERS, is_data, is_read
from halos.data.readers.streams import CODECS
from halos.data.row import Row
from halos.data.split import default_splits
from halos.errors import UserError, user_errors

_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
URL = "hf://datasets/"
_PART = re.compile(rf"{URL}(?P<name>[\w.-]+/[\w.-]+)/(?P<below>[\w./-]+)")


def refuse_local(path: str, hint: str, *, is_file: bool) -> None:
    """Raises UserError for a name that can only be a file's: asking the hub would fail, after half a minute where it is
    unreachable."""
    if path.startswith(URL):
        if not _PART.fullmatch(path):
            raise UserError(f"{path}: a file or directory of a data set of the hub is written {URL}org/name/file.json")
    elif is_file or path.startswith(".") or _looks_local(Path(path)) or not _HUB.fullmatch(path):
        raise UserError(f"{path}: no such file or directory{hint}")


@contextmanager
def _found(path: str, what: str, hint: str = "") -> Iterator[None]:
    """Raise whatever the hub's client raises as a UserError. Where the hub's name does not resolve, only the client's cache is
    read: it would try to reach it for a minute."""
    from huggingface_hub import constants

    is_known = any(urllib.request.getproxies().get(kind) for kind in ("https", "all")) or _resolves(constants.ENDPOINT)
    offline, why = constants.HF_HUB_OFFLINE, "" if is_known else f"{constants.ENDPOINT} cannot be reached from here; "
    remedy = f"{why}a local copy is given as {{path: DIRECTORY}}, with the same format, split and filter"
    with user_errors(f"{path}: {what}", f"{hint.removeprefix('; ')}{'; ' if hint else ''}{remedy}"):
        try:
            set_offline(offline or not is_known)
            yield
        finally:
            set_offline(offline)


def set_offline(offline: bool) -> None:
    import datasets.config
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = offline


def _resolves(url: str) -> bool:
    try:
        socket.getaddrinfo(urllib.parse.urlparse(url).hostname, 443)
    except OSError:
        return False
    return True


def hub_file(path: str, revision: str | None) -> Path | None:
    """Return the downloaded copy of a file of a data set; None where the path names none."""
    part = _PART.fullmatch(path)
    if part is None or not is_read(Path(path)):
        return None
    from huggingface_hub import hf_hub_download

    with _found(path, "no file of an available data set of the hub"):
        return Path(hf_hub_download(part["name"], part["below"], repo_type="dataset", revision=revision))


def rows_of_hub(path: str, split: str, revision: str | None, purpose: str, hint: str) -> tuple[str, Callable[[], Iterator[Row]]]:
    """Return the fingerprint and the rows of a split; of that of `purpose` where `split` is empty."""
    from datasets import Dataset, DatasetDict, load_dataset

    part = _PART.fullmatch(path)
    where: dict[str, Any] = {"data_dir": part["below"]} if part else {}
    name, _, config = (part["name"] if part else path).partition(":")
    with _found(path, "neither a file or directory here nor an available data set of the hub", hint):
        loaded = load_dataset(name, config or None, split=split or None, revision=revision, **where)
    if isinstance(loaded, DatasetDict):
        has = [str(name) for name in loaded]
        split = next((name for name in default_splits(purpose) if name in has), "")
        if not split:
            raise UserError(f"{path}: which split? It has {', '.join(has)}; write {{path: {path}, split: ...}}")
        loaded = loaded[split]
    assert isinstance(loaded, Dataset)
    table = loaded

    classes = class_names(table.features.arrow_schema.metadata)

    def rows() -> Iterator[Row]:
        return (Row(with_classes(dict(record), classes), f"{path}[{split}]:{n}") for n, record in enumerate(table, 1))

    return table._fingerprint, rows


def stream_of_hub(
    path: str, split: str, revision: str | None, purpose: str, hint: str
) -> tuple[str, Callable[[], Iterator[Row]]]:
    """As `rows_of_hub`, of rows that are fetched as they are read; the fingerprint is that of the commit."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    part = _PART.fullmatch(path)
    where: dict[str, Any] = {"data_dir": part["below"]} if part else {}
    name, _, config = (part["name"] if part else path).partition(":")
    with _found(path, "no data set of the hub that can be streamed", hint):
        commit = HfApi().dataset_info(name, revision=revision).sha
        loaded: Any = load_dataset(name, config or None, revision=commit, streaming=True, **where)
    names = [split] if split else default_splits(purpose)
    if (found := next((each for each in names if each in loaded), None)) is None:
        raise UserError(f"{path}: which split? It has {', '.join(loaded)}; write {{path: {path}, split: ...}}")
    table = loaded[found]
    classes = class_names(table.features.arrow_schema.metadata) if table.features else {}

    def rows() -> Iterator[Row]:
        records, number = iter(table), 0
        while True:
            number += 1
            with user_errors(f"{path}[{found}]: cannot be fetched, from row {number} on"):
                record = next(records, None)
            if record is None:
                return
            yield Row(with_classes(dict(record), classes), f"{path}[{found}]:{number}")

    return f"{path} {found} {commit}", rows


def misspelled(path: str, known: list[str]) -> str:
    near = nearest(path, known)
    return f"; did you mean '{near}'?" if near else ""


def _looks_local(path: Path) -> bool:
    is_file = path.suffix.removeprefix(".").lower() in {*READERS, *CODECS, "txt"} or is_data(path)
    return is_file or (len(path.parts) > 1 and path.parent.is_dir())
