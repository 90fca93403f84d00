"""Look at what a run saved, check it, hand it over: python -m halos.checkpoint {ls,verify,export,merge} PATH ..."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from halos import confined
from halos.checkpoint import manifest, select
from halos.errors import UserError, command, one_line
from halos.rundir import ASIDE, RunDir, is_run

KEPT = ("rollouts/*", f"checkpoints/{ASIDE}*/*")


def _size(path: Path) -> str:
    return manifest.human_size(sum(file.stat().st_size for file in manifest.files_of(path)))


def _saved(run: Path) -> list[Path]:
    """A run's checkpoints and its FINAL; or the one directory that was named."""
    if (run / manifest.NAME).exists():
        return [run]
    if run.is_dir():
        confined.inspect(run, home=run)
    found = select.checkpoints(run / "checkpoints") + [path for path in [run / "FINAL"] if path.is_dir()]
    found = found or select.checkpoints(run)  # RUN/checkpoints itself
    if not run.is_dir():
        raise UserError(
            f"{run} is a file: give a run's directory, or a checkpoint's"
            if run.exists()
            else f"{run}: there is no such directory"
        )
    if not found and is_run(run):
        raise UserError(f"{run} has saved nothing yet")
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
        metrics = select.metrics_of(path).get("eval", {})
        shown = "  ".join(f"{one_line(k)} {v:.4g}" for k, v in metrics.items() if isinstance(v, float) and k != "seconds")
        print(f"{one_line(path.name):14s} {_size(path):>10s}  {_condition(path):5s}  {shown}")
    return 0


def verify(run: Path) -> int:
    """Every file of a run: checkpoints against their manifests, its own against their seals; 1 where something is wrong."""
    bad = False
    for directory in filter(is_run, [run, *sorted(run.glob("rounds/*/train"))]):
        from halos.checkpoint import runfiles  # here: it reads lineages, which takes torch

        prefix = f"{directory.relative_to(run)}/" if directory != run else ""
        for name, said in runfiles.report(RunDir(directory)).items():
            print(f"{one_line(prefix + name)}: {one_line(said)}")
            bad |= not said.startswith("ok")
        bad |= bool(prefix) and _verify_saves(directory, prefix)
    return int(_verify_saves(run, "") or bad)


def _kept_beside(run: Path) -> list[Path]:
    """What else of a run is under a manifest: what was known of its rollouts, and what was set aside."""
    return sorted(path.parent for pattern in KEPT for path in run.glob(f"{pattern}/{manifest.NAME}"))


def _verify_saves(run: Path, prefix: str) -> bool:
    """Whether a file of a checkpoint is not what it was."""
    bad, beside = False, _kept_beside(run)
    for path in [*_saved(run), *beside]:
        faults = {fault.file: fault for fault in manifest.verify(path)}
        listing = manifest.read(path)
        listed = {} if isinstance(listing, manifest.Fault) else listing["files"]
        for name in sorted({*listed, *faults}):
            shown = path.relative_to(run) if path in beside else path.name
            print(f"{one_line(f'{prefix}{shown}/{name}')}: {faults[name].reason if name in faults else 'ok'}")
        bad |= bool(faults)
    return bad


def export(given: argparse.Namespace) -> int:
    """A checkpoint, FINAL or any adapter as a directory to load or to push: merged where there is an adapter, else whole."""
    import torch

    from halos import logs
    from halos.export import export as room
    from halos.export import hub
    from halos.merge.safetensors_io import SHARD, size_of

    if given.push_to_hub is not None:
        hub.check_name(given.push_to_hub)
    elif given.private or given.revision:
        raise UserError("--private and --revision are for --push-to-hub ORG/NAME: add it, or leave them out")
    logs.silence_libraries()
    shard = size_of(given.max_shard_size) if given.max_shard_size else SHARD
    dtype = getattr(torch, given.dtype) if given.dtype else None
    if given.kind == "adapter":
        if dtype is not None or given.max_shard_size:
            raise UserError("--dtype and --max-shard-size are for whole weights: leave them out, or --adapter")
        said = room.adapter(given.path, given.output, base=given.base)
    elif given.kind == "merged" or room.Saved.at(given.path).adapter is not None:
        said = room.merged(given.path, given.output, dtype=dtype, base=given.base, shard=shard)
    else:
        said = room.whole(given.path, given.output, dtype=dtype, shard=shard)
    print(f"{given.output}: {said}")
    if given.push_to_hub is not None:
        print(hub.push(given.output, given.push_to_hub, private=given.private, revision=given.revision))
    return 0


def add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", type=Path, help="a checkpoint, FINAL, a run's directory, or an adapter's")
    command.add_argument("--output", type=Path, required=True, help="the directory to make")
    command.add_argument("--base", type=Path, help="where the adapter's base lies now")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; as they are by default")
    command.add_argument("--max-shard-size", metavar="SIZE", help="of a file of weights: 5GB (the default), 200MB")
    command.add_argument(
        "--push-to-hub", metavar="ORG/NAME", help="upload it too, with the token of the environment or the login"
    )
    command.add_argument("--private", action="store_true", help="make the repository private, where it does not exist yet")
    command.add_argument("--revision", help="push to this branch")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m halos.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("ls", ls), ("verify", verify)):
        asked = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        asked.add_argument("path", type=Path, nargs="+", help="a run directory, or one checkpoint in it")
        asked.set_defaults(function=lambda given, each=function: max(each(path) for path in given.path))
    asked = commands.add_parser("export", help=export.__doc__, description=export.__doc__)
    add_export(asked)
    kind = asked.add_mutually_exclusive_group()
    kind.add_argument("--merged", dest="kind", action="store_const", const="merged", help="base and adapter in one")
    kind.add_argument("--adapter", dest="kind", action="store_const", const="adapter", help="the adapter alone, for PEFT")
    asked.set_defaults(function=export)
    asked = commands.add_parser("merge", help="export --merged", description="The same as export --merged.")
    add_export(asked)
    asked.set_defaults(function=export, kind="merged")
    arguments = parser.parse_args(words)
    return command(lambda: arguments.function(arguments))


if __name__ == "__main__":
    sys.exit(main())
