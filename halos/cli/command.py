"""The command `halos`, from its arguments to its exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser

from halos.cli import single, sweep
from halos.cli.caller import restore_determinism, restore_generators
from halos.cli.compose import ConfigTree
from halos.cli.overrides import parse
from halos.cli.result import Result
from halos.cli.resume import AUTO, requested_run
from halos.cli.status import FAILED, refuse
from halos.collection import collect_rarely
from halos.config import renamed_keys
from halos.config.overrides import Override, check_choices, quote_nested, unreadable
from halos.config.secrets import refuse_secrets
from halos.distributed.children import exit_process
from halos.distributed.environment import count_from_environment, refuse_partial_launch, world_size
from halos.distributed.signals import exit_on_stop_signal, restore_signals_and_argv
from halos.errors import JobsFailedError, UserError, closed_pipe_status, write_message
from halos.redaction import write_redacted_tracebacks
from halos.repository import COMMAND


def main() -> None:
    """Run the command line and exit with its status."""
    collect_rarely()
    exit_on_stop_signal()
    write_redacted_tracebacks()
    try:
        exit_process(dispatch(sys.argv[1:]))
    except UserError as error:
        exit_process(refuse(error))
    except JobsFailedError as error:
        write_message(error)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(closed_pipe_status())


def start(argv: Sequence[str]) -> int:
    """Run a command inside the caller's process and return its exit status. Raises UserError; restores signals and sys.argv."""
    with restore_signals_and_argv():
        return dispatch(argv)


def train(overrides: Sequence[str]) -> Result:
    """Start or resume one run inside the caller's process. Raises UserError, for command-line options such as -m too."""
    if options := [each for each in overrides if each.startswith("-")]:
        raise UserError(f"{options[0]} is an option of the command line: train() takes overrides, as in train(['loss=dpo'])")
    with restore_signals_and_argv(), restore_generators(), restore_determinism():
        refuse_partial_launch()
        refuse_secrets({}, overrides)
        tree, quoted = ConfigTree(), _normalized(overrides)
        parsed = [parse(text, tree.choices) for text in quoted]
        check_choices(parsed, tree.choices, multirun=False)
        if for_hydra := [one.text for one in parsed if one.is_hydra]:
            raise UserError(f"{for_hydra[0]}: Hydra's own keys belong to the command line")
        return _start_or_resume(parsed, quoted, tree)


def dispatch(argv: Sequence[str]) -> int:
    """Check the arguments before Hydra runs, since Hydra's own errors exit 1 with tracebacks or bad advice."""
    args, unknown = get_args_parser().parse_known_intermixed_args(argv)
    if unknown:
        raise UserError(unreadable(unknown[0], "an option that does not exist"))
    flags = [each for each in argv if each not in args.overrides]
    overrides = _normalized(args.overrides)
    if args.hydra_help or args.shell_completion or args.experimental_rerun or (args.help and not overrides):
        return sweep.enter_hydra([*overrides, *flags])
    multirun = args.multirun or "hydra.mode=MULTIRUN" in overrides
    if multirun and world_size() > 1:
        raise UserError(
            "a sweep cannot run inside accelerate launch, where the second job would fail:"
            f" {COMMAND} -m ... hydra/launcher=accelerate starts each job with its own accelerate launch"
        )
    refuse_partial_launch()
    refuse_secrets({}, overrides)
    tree = ConfigTree.of_options(args.config_path, args.config_dir, args.config_name)
    parsed = [parse(text, tree.choices) for text in overrides]
    check_choices(parsed, tree.choices, multirun=multirun)
    resumes = requested_run(parsed) not in (None, AUTO)
    if multirun and resumes:
        raise UserError("resume= continues one run, so it cannot be part of a sweep: leave out -m")
    if multirun:
        return sweep.run_sweep(parsed, overrides, flags, tree)
    if not resumes and (args.help or args.cfg or args.info or any(one.is_hydra for one in parsed)):
        return sweep.run_through_hydra(parsed, flags, tree)
    return _start_or_resume(parsed, overrides, tree).exit_status


def _normalized(overrides: Sequence[str]) -> list[str]:
    """Return the overrides with renamed keys updated, which prints a note, and quoted for Hydra's grammar."""
    if (note := renamed_keys.deprecation_note(overrides)) and not count_from_environment("LOCAL_RANK", 0):
        print(note, file=sys.stderr)
    return [quote_nested(renamed_keys.rename_override(each)) for each in overrides]


def _start_or_resume(parsed: Sequence[Override], overrides: Sequence[str], tree: ConfigTree) -> Result:
    """Start a new run, or resume the one that resume= names."""
    path = requested_run(parsed)
    return single.start(parsed, tree) if path in (None, AUTO) else single.resume(path, parsed, overrides, tree)
