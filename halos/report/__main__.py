"""python -m halos.report RUN [RUN ...]: a table and figures of saved runs, finished or not; for a sweep also sweep.csv,
for online runs prompts.csv."""

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
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or a directory with runs below it")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where figures go (default: `report` next to the runs)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    chosen = parser.parse_args(arguments)
    return command(lambda: _report(chosen.runs, chosen.output or _default_output(chosen.runs), chosen.markdown))


def _report(paths: Sequence[Path], output: Path, markdown: Path | None) -> int:
    records, skipped = read_runs(paths)
    for problem in skipped:
        print(f"skipped: {problem}", file=sys.stderr)
    text = table(records)
    print(text)
    try:
        from halos.report.plots import plot  # only here: the table needs no matplotlib
        from halos.report.prompts import write_prompts
        from halos.report.sweep import compare, is_sweep
    except ModuleNotFoundError as error:
        raise UserError(f"figures need {error.name}: pip install {error.name}") from error
    try:
        if markdown:
            markdown.parent.mkdir(parents=True, exist_ok=True)
            markdown.write_text(text, encoding="utf-8")
            print(markdown)
        if len(paths) == 1 and is_sweep(paths[0]):
            text, written = compare(paths[0], output)
            print(text)
        else:
            written = plot(records, output)
        prompts, problems = write_prompts(records, output)
        for problem in problems:
            print(f"skipped: {problem}", file=sys.stderr)
        written = [*written, *([prompts] if prompts else [])]
        for path in written:
            print(path)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}; choose another directory with --output") from error
    return 0


def _default_output(paths: Sequence[Path]) -> Path:
    """Return `report` inside the only path, or in the parent of all paths."""
    if len(paths) == 1:
        return paths[0] / "report"
    return Path(os.path.relpath(os.path.commonpath([path.resolve() for path in paths]))) / "report"


if __name__ == "__main__":
    sys.exit(main())
