"""python -m halos.report RUN [RUN ...]: a table and pictures from saved runs, finished or not; of a sweep sweep.csv as well."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from halos.errors import UserError, command
from halos.report.read import read_runs
from halos.report.table import table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m halos.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory, or one with runs below it")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where pictures go (default: `report` beside the runs)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    chosen = parser.parse_args(arguments)
    return command(lambda: _report(chosen.runs, chosen.output or _default_output(chosen.runs), chosen.markdown))


def _report(places: Sequence[Path], output: Path, markdown: Path | None) -> int:
    records, passed = read_runs(places)
    for problem in passed:
        print(f"passed over: {problem}", file=sys.stderr)
    text = table(records)
    print(text)
    try:
        from halos.report.plots import plot  # only here: the table needs no matplotlib
        from halos.report.sweep import compare, is_sweep
    except ModuleNotFoundError as error:
        raise UserError(f"pictures need {error.name}: pip install {error.name}") from error
    try:
        if markdown:
            markdown.parent.mkdir(parents=True, exist_ok=True)
            markdown.write_text(text, encoding="utf-8")
            print(markdown)
        if len(places) == 1 and is_sweep(places[0]):
            text, written = compare(places[0], output)
            print(text)
        else:
            written = plot(records, output)
        for path in written:
            print(path)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}; choose another place with --output") from error
    return 0


def _default_output(places: Sequence[Path]) -> Path:
    """Inside the one directory that was named, or in the one above all of them."""
    if len(places) == 1:
        return places[0] / "report"
    return Path(os.path.relpath(os.path.commonpath([place.resolve() for place in places]))) / "report"


if __name__ == "__main__":
    sys.exit(main())
