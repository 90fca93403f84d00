"""Names of the sources of a run, under which its header and its evaluation report them."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

from halos.data.readers.kinds import READERS
from halos.data.readers.streams import CODECS, suffix_of
from halos.data.sources import Source
from halos.errors import UserError

LEVELS = 4  # a file's name, with its split, with one and with two directories


def names_of(sources: Sequence[Source], purpose: str = "train") -> list[str]:
    """Return a name for each source, none twice: its `name`, else that of its file or data set, with the split, the directories
    or a number where another source has that too. Raises UserError for two entries with one `name`."""
    given = Counter(source.name for source in sources if source.name)
    if double := next((name for name, times in given.items() if times > 1), None):
        raise UserError(f"data.{purpose}: {given[double]} entries have the name {double}: give each another")
    names = [source.name or _made_of(source, 0) for source in sources]
    for level in range(1, LEVELS):
        taken = Counter(names)
        names = [_made_of(source, level) if taken[name] > 1 and not source.name else name
                 for source, name in zip(sources, names, strict=True)]  # fmt: skip
    for number, source in enumerate(sources):
        others = {*names[:number], *given}
        if not source.name:
            longer = chain([names[number]], (f"{names[number]}_{more}" for more in count(2)))
            names[number] = next(name for name in longer if name not in others)
    return names


def _made_of(source: Source, level: int) -> str:
    """Return a name of a file or data set; of a pattern, that of the directory before its first wildcard."""
    fixed = [part for part in re.split(r"[/\\]", re.split(r"[*?\[]", source.path)[0]) if part] or [source.path]
    stem = Path(fixed[-1])
    stem = stem.with_suffix("") if suffix_of(stem) in CODECS else stem
    stem = stem.with_suffix("") if suffix_of(stem) in READERS else stem
    directories = fixed[-level:-1] if level > 1 else []
    parts = [*directories, stem.name, *([source.split] if level and source.split else [])]
    return re.sub(r"[^\w.-]+", "_", "_".join(parts)).strip("_.-") or "data"
