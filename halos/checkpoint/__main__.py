"""List, verify, export and merge what a run saved: python -m halos.checkpoint {ls,verify,export,merge} PATH ..."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from halos import confined
from halos.checkpoint import manifest, select
from halos.errors import UserError, command, one_line
from halos.rundir import SUPERSEDED, RunDir, is_run

OTHER_MANIFESTS = ("rollouts/*", f"checkpoints/{SUPERSEDED}*/*")  # a cache of rollouts' log-probs, and superseded checkpoints


def _size(path: Path) -> str:
    return manifest.human_size(sum(file.stat().st_size for file in manifest.files_of(path)))


def _saved(run: Path) -> list[Path]:
    """Return a run's checkpoints and its FINAL; or `run` itself where it is one of them."""
    if (run / manifest.NAME).exists():
        return [run]
    saved = _inside(run) or select.checkpoints(run)  # RUN/checkpoints itself
    if not run.is_dir():
        raise UserError(
            f"{run} is a file: give a run's directory, or a checkpoint's"
            if run.exists()
            else f"{run}: there is no such directory"
        )
    if not saved and is_run(run):
        raise UserError(f"{run} has saved nothing yet")
    if not saved:
        raise UserError(f"{run} holds no checkpoints: it is neither a run directory nor a checkpoint")
    return saved


def _inside(run: Path) -> list[Path]:
    """Return the checkpoints and the FINAL in a run's directory; none where it has saved none, or has deleted them."""
    if run.is_dir():
        confined.inspect(run, home=run)
    return select.checkpoints(run / "checkpoints") + [path for path in [run / "FINAL"] if path.is_dir()]


def _condition(path: Path) -> str:
    try:
        return "BAD" if manifest.verify(path) else "whole"
    except manifest.NewerFormatError:
        return "NEWER"


def ls(run: Path) -> int:
    """List checkpoints with size, condition (BAD: damaged; NEWER: saved by a later version) and evaluation metrics."""
    for path in _saved(run):
        saved = select.metrics_of(path)
        metrics = saved.get("eval", {})
        values = "  ".join(f"{one_line(k)} {v:.4g}" for k, v in metrics.items() if isinstance(v, float) and k != "seconds")
        step = metrics.get("step")
        earlier = f"evaluation of step {one_line(str(step))}:  " if values and step not in (None, saved.get("step")) else ""
        print(f"{one_line(path.name):14s} {_size(path):>10s}  {_condition(path):5s}  {earlier}{values}")
    return 0


def verify(run: Path) -> int:
    """Verify every file of a run: checkpoints by their manifests, other files by their seals; status 1 if one has changed."""
    bad, rounds = False, sorted(run.glob("rounds/*/train"))
    for directory in filter(is_run, [run, *rounds]):
        from halos.checkpoint import runfiles  # here, because it imports torch

        prefix = f"{directory.relative_to(run)}/" if directory != run else ""
        for name, finding in runfiles.report(RunDir(directory)).items():
            print(f"{one_line(prefix + name)}: {one_line(finding)}")
            bad |= not finding.startswith("ok")
        bad |= bool(prefix) and _verify_checkpoints(directory, _inside(directory), prefix)
    return int(_verify_checkpoints(run, _inside(run) if rounds else _saved(run), "") or bad)


def _other_directories(run: Path) -> list[Path]:
    """Return the other directories of a run that have a manifest."""
    return sorted(path.parent for pattern in OTHER_MANIFESTS for path in run.glob(f"{pattern}/{manifest.NAME}"))


def _verify_checkpoints(run: Path, saved: Sequence[Path], prefix: str) -> bool:
    """Print a line for each file that has a manifest; return whether one of them changed."""
    bad, others = False, _other_directories(run)
    for path in [*saved, *others]:
        faults = {fault.file: fault for fault in manifest.verify(path)}
        listing = manifest.read(path)
        listed = {} if isinstance(listing, manifest.Fault) else listing["files"]
        for name in sorted({*listed, *faults}):
            label = path.relative_to(run) if path in others else path.name
            print(f"{one_line(f'{prefix}{label}/{name}')}: {faults[name].reason if name in faults else 'ok'}")
        bad |= bool(faults)
    return bad


def export(arguments: argparse.Namespace) -> int:
    """Export a checkpoint, FINAL or any adapter to a directory that loads anywhere: an adapter merged, else the whole model."""
    import torch

    from halos import logs
    from halos.export import export as exporter
    from halos.export import hub
    from halos.merge.safetensors_io import SHARD, parse_size

    if arguments.push_to_hub is not None:
        hub.check_name(arguments.push_to_hub)
    elif arguments.private or arguments.revision:
        raise UserError("--private and --revision are for --push-to-hub ORG/NAME: add it, or leave them out")
    logs.silence_libraries()
    shard = parse_size(arguments.max_shard_size) if arguments.max_shard_size else SHARD
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if arguments.kind == "adapter":
        if dtype is not None or arguments.max_shard_size:
            raise UserError("--dtype and --max-shard-size are for whole weights: leave them out, or --adapter")
        summary = exporter.adapter(arguments.path, arguments.output, base=arguments.base)
    elif arguments.kind == "merged" or exporter.SavedModel.at(arguments.path).adapter is not None:
        summary = exporter.merged(arguments.path, arguments.output, dtype=dtype, base=arguments.base, shard=shard)
    else:
        summary = exporter.whole(arguments.path, arguments.output, dtype=dtype, shard=shard)
    print(f"{arguments.output}: {summary}")
    if arguments.push_to_hub is not None:
        print(hub.push(arguments.output, arguments.push_to_hub, private=arguments.private, revision=arguments.revision))
    return 0


def add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", type=Path, help="a checkpoint, FINAL, a run's directory, or an adapter's")
    command.add_argument("--output", type=Path, required=True, help="the directory to write; it must not exist")
    command.add_argument("--base", type=Path, help="the directory of the adapter's base, if it has moved")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="dtype of the weights; unchanged by default")
    command.add_argument("--max-shard-size", metavar="SIZE", help="largest weight file, for example 5GB (the default) or 200MB")
    command.add_argument(
        "--push-to-hub", metavar="ORG/NAME", help="also upload it, with the token of the environment or of the login"
    )
    command.add_argument("--private", action="store_true", help="make the repository private, if it does not exist yet")
    command.add_argument("--revision", help="push to this branch")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m halos.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("ls", ls), ("verify", verify)):
        subparser = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        subparser.add_argument("path", type=Path, nargs="+", help="a run directory, or one checkpoint in it")
        subparser.set_defaults(function=lambda arguments, each=function: max(each(path) for path in arguments.path))
    subparser = commands.add_parser("export", help=export.__doc__, description=export.__doc__)
    add_export(subparser)
    kind = subparser.add_mutually_exclusive_group()
    kind.add_argument("--merged", dest="kind", action="store_const", const="merged", help="base and adapter in one")
    kind.add_argument("--adapter", dest="kind", action="store_const", const="adapter", help="the adapter alone, for PEFT")
    subparser.set_defaults(function=export)
    subparser = commands.add_parser("merge", help="export --merged", description="The same as export --merged.")
    add_export(subparser)
    subparser.set_defaults(function=export, kind="merged")
    arguments = parser.parse_args(argv)
    return command(lambda: arguments.function(arguments))


if __name__ == "__main__":
    sys.exit(main())
