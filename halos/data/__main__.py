"""List and prune the cache of tokenised rows: python -m halos.data {ls,prune} [--cache-dir DIRECTORY] ..."""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from halos.errors import UserError, command, one_line

if TYPE_CHECKING:
    from halos.data.stored import Stored

AGES = {"h": 3600.0, "d": 86400.0, "w": 604800.0}
SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def age(text: str) -> float:
    """Parse `12h`, `30d` or `8w`: seconds. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", text)
    if match is None:
        raise UserError(f"--older-than={text} is no age: write a number and a unit, such as 12h, 30d or 8w")
    return float(match[1]) * AGES[match[2]]


def size(text: str) -> int:
    """Parse `500MB` or `20GB` in decimal units. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B)", text.upper())
    if match is None:
        raise UserError(f"--to-size={text} is no size: write a number and a unit, such as 500MB or 20GB")
    return int(float(match[1]) * SIZES[match[2]])


def _cache(given: Path | None) -> Path:
    from halos.config.run_config import default_cache  # here and below, since --help needs none of it
    from halos.confined import expanded

    return expanded(given or default_cache())


def ls(arguments: argparse.Namespace) -> int:
    """List tokenised data sets of runs and shards of sources, the last used first: rows, tokens, size, last use, tokenizer."""
    from halos.checkpoint.manifest import human_size
    from halos.data import stored

    found = stored.stored(_cache(arguments.cache_dir))
    for each in found:
        print(_line(each))
    sources = [each.size for each in found if each.kind == "source"]
    print(
        f"{len(found)} in all, {human_size(sum(each.size for each in found))}; {human_size(sum(sources))} of it shards of sources"
    )
    return 0


def _line(each: "Stored", why: str = "") -> str:
    from halos.checkpoint.manifest import human_size

    tokens = "?" if each.tokens is None else f"{each.tokens:,}"
    counts = f"{each.rows:>11,} rows {tokens:>14} tokens {human_size(each.size):>10}"
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.used))
    names = ("tokenizer", "template", "max_length")
    made = ", ".join(f"{name} {each.made[name]}" for name in names if each.made.get(name))
    source = " + ".join(each.sources) or "unknown source"
    notes = [part for part in (made, why or each.unusable) if part]
    return one_line(f"{each.kind:8} {each.key[:8]} {counts}  {used}  {source}{''.join(f'; {note}' for note in notes)}")


def prune(arguments: argparse.Namespace) -> int:
    """Remove tokenised rows by their last use, by size, or those that nothing can use; without --yes only tell which. What a
    running run reads or writes stays, and what a later run needs is tokenised again."""
    from halos.checkpoint.manifest import human_size
    from halos.data import prune as pruner
    from halos.data import stored

    older, limit = arguments.older_than, arguments.to_size
    rule = pruner.Rule(None if older is None else age(older), None if limit is None else size(limit), arguments.unusable)
    if rule == pruner.Rule():
        raise UserError("nothing is to be pruned: give --older-than=30d, --to-size=20GB or --unusable, or several of them")
    removed, freed = 0, 0
    for each, why in rule.chosen(stored.stored(_cache(arguments.cache_dir))):
        try:
            is_gone = pruner.remove(each) if arguments.yes else not pruner.is_held(each)
        except OSError as error:
            raise UserError(f"{each.path}: cannot be removed: {error.strerror}") from error
        print(_line(each, why if is_gone else f"{why}, but a run uses it: it stays"))
        removed, freed = removed + is_gone, freed + is_gone * each.size
    verb = "removed" if arguments.yes else "would be removed"
    print(f"{removed} {verb}, {human_size(freed)}{'' if arguments.yes or not removed else '; --yes removes them'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m halos.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("ls", ls), ("prune", prune)):
        subparser = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        subparser.add_argument("--cache-dir", type=Path, help="the cache_dir of the runs; by default that of config/config.yaml")
        subparser.set_defaults(function=function)
    subparser = commands.choices["prune"]
    subparser.add_argument("--older-than", metavar="AGE", help="what no run has used for so long: 12h, 30d, 8w")
    subparser.add_argument("--to-size", metavar="SIZE", help="what was used the longest ago, until the rest takes no more: 20GB")
    subparser.add_argument("--unusable", action="store_true", help="what another version made, and what is unfinished or damaged")
    subparser.add_argument("--yes", action="store_true", help="remove it, instead of telling what would be removed")
    arguments = parser.parse_args(argv)
    return command(lambda: arguments.function(arguments))


if __name__ == "__main__":
    sys.exit(main())
