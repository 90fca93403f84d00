"""Look at what a run saved, check it byte for byte, merge its adapter: python -m halos.checkpoint {ls,verify,merge} PATH"""

import argparse
import sys
from pathlib import Path

from halos.checkpoint import find, manifest
from halos.errors import UserError


def _size(path: Path) -> str:
    return manifest.in_words(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))


def _saved(run: Path) -> list[Path]:
    """A run's checkpoints and its FINAL; or the one directory that was named."""
    if (run / manifest.NAME).exists():
        return [run]
    found = find.checkpoints(run / "checkpoints") + [path for path in [run / "FINAL"] if path.is_dir()]
    if not found:
        raise UserError(f"{run} holds no checkpoints: it is neither a run directory nor a checkpoint")
    return found


def _condition(path: Path) -> str:
    try:
        return "BAD" if manifest.verify(path) else "whole"
    except manifest.NewerFormatError:
        return "NEWER"


def ls(run: Path) -> int:
    """Steps, sizes, held-out metrics, and whether each is whole (BAD: damaged; NEWER: saved by a later version)."""
    for path in _saved(run):
        metrics = find.metrics_of(path).get("eval", {})
        shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, float) and k != "seconds")
        print(f"{path.name:14s} {_size(path):>10s}  {_condition(path):5s}  {shown}")
    return 0


def verify(run: Path) -> int:
    """Every file of every checkpoint against its manifest; 1 where something is wrong."""
    bad = False
    for path in _saved(run):
        faults = {fault.file: fault for fault in manifest.verify(path)}
        listing = manifest.read(path)
        listed = {} if isinstance(listing, manifest.Fault) else listing["files"]
        for name in sorted({*listed, *faults}):
            print(f"{path.name}/{name}: {faults[name].reason if name in faults else 'ok'}")
        bad |= bool(faults)
    return int(bad)


def merge(saved: Path, output: Path, dtype: str | None) -> int:
    """Merge an adapter (a checkpoint's, FINAL's or one of its own) into --output, which plain from_pretrained loads."""
    import torch

    from halos.checkpoint.handover import merged

    print(f"{output}: {merged(saved, output, getattr(torch, dtype) if dtype else None)}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m halos.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("ls", ls), ("verify", verify)):
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.add_argument("path", type=Path, nargs="+", help="a run directory, or one checkpoint in it")
        command.set_defaults(function=function)
    command = commands.add_parser("merge", help=merge.__doc__, description=merge.__doc__)
    command.add_argument("path", type=Path, help="a checkpoint, FINAL, or an adapter's directory")
    command.add_argument("--output", type=Path, required=True, help="the directory to make")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; the base's own by default")
    arguments = parser.parse_args()
    try:
        if arguments.command == "merge":
            return merge(arguments.path, arguments.output, arguments.dtype)
        return max(arguments.function(path) for path in arguments.path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
