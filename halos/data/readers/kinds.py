"""The kinds of files that are read, and how to convert others."""

from collections.abc import Callable, Iterator
from pathlib import Path

from halos.data.readers.columnar import read_arrow, read_parquet
from halos.data.readers.json_rows import read_json, read_jsonl
from halos.data.readers.streams import CODECS, inner_suffix, suffix_of
from halos.data.readers.table import read_csv, read_tsv
from halos.data.row import Row
from halos.errors import UserError

Reader = Callable[[Path], Iterator[Row]]

READERS: dict[str, Reader] = {
    "jsonl": read_jsonl,
    "ndjson": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "feather": read_arrow,
}
NOT_COMPRESSED = ("parquet", "arrow", "feather")  # they compress their own pages, and are read from any place
KINDS = f".json, .jsonl, .csv, .tsv ({', '.join(f'.{codec}' for codec in CODECS)} too), .parquet and .arrow files are read"
_TO_JSONL = "df.to_json(r'{to}', orient='records', lines=True, force_ascii=False)"
_LINES = "open(r'{to}', 'w').writelines(json.dumps({{'text': line.rstrip()}}) + chr(10) for line in open(r'{path}'))"
COMMANDS = {  # by suffix: how to make rows or files of it
    "txt": f'python -c "import json; {_LINES}"',
    "xlsx": f"python -c \"import pandas; df = pandas.read_excel(r'{{path}}'); {_TO_JSONL}\"",
    "pkl": f"python -c \"import pandas; df = pandas.read_pickle(r'{{path}}'); {_TO_JSONL}\" (a pickle can run code)",
    "orc": f"python -c \"import pandas; df = pandas.read_orc(r'{{path}}'); {_TO_JSONL}\"",
    "xml": f"python -c \"import pandas; df = pandas.read_xml(r'{{path}}'); {_TO_JSONL}\"",
    "yaml": "python -c \"import json, yaml; json.dump(yaml.safe_load(open(r'{path}')), open(r'{stem}.json', 'w'))\"",
    "zip": "unzip '{path}' -d '{stem}'",
    "tar": "mkdir '{stem}' && tar -xf '{path}' -C '{stem}'",
}  # fmt: skip
_SAME = {"xls": "xlsx", "pickle": "pkl", "yml": "yaml", "tgz": "tar"}
NOT_READ = {"zip", "tar", "tgz", "pickle", "pkl", "xlsx", "xls", "orc", "avro", "h5", "hdf5"}  # data in directories
UNFINISHED = ("part", "partial", "crdownload", "incomplete", "aria2")  # suffixes of files that are still copied


def is_read(path: Path) -> bool:
    """Return whether a file's name says that it holds rows which can be read."""
    return inner_suffix(path) in READERS and not (suffix_of(path) in CODECS and inner_suffix(path) in NOT_COMPRESSED)


def is_data(path: Path) -> bool:
    """Return whether a file that is not read seems to hold data."""
    if suffix_of(path) in UNFINISHED:
        return is_data(path.with_suffix("")) or is_read(path.with_suffix(""))
    return suffix_of(path) in NOT_READ or inner_suffix(path) in READERS or suffix_of(path) in CODECS


def reader_for(path: Path, format: str | None) -> Reader:
    """Return the reader of `path`: that of `format`, else that of its suffix. Raises UserError, with the ways that would work."""
    kind = format or inner_suffix(path)
    if kind in NOT_COMPRESSED and suffix_of(path) in CODECS:
        raise UserError(f"{path}: a .{kind} file is read as it is, not compressed as a whole: decompress it first")
    if kind in READERS:
        return READERS[kind]
    raise UserError(f"{path}: {KINDS}, and this is none of them{_ways(path)}")


def _ways(path: Path) -> str:
    suffix = suffix_of(path)
    command = COMMANDS.get(_SAME.get(suffix, suffix))
    ways = [] if suffix != "txt" and command else [f"name its kind with format: {' | '.join(READERS)}"]
    if command:
        ways = [f"convert it, for example {command.format(path=path, to=path.with_suffix('.jsonl'), stem=path.with_suffix(''))}"]
        ways += ["name its kind with format: jsonl if it is one"] if suffix == "txt" else []
    own = f"read it with a function of yours, from a path to rows: {{path: {path}, reader: mymodule.read}} and plugins=[mymodule]"
    return f": {'; or '.join([*ways, own])}"
