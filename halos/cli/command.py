"""A command from its words to its exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser

from halos.cli import single, sweep
from halos.cli.compose import ConfigTree
from halos.cli.overrides import parse
from halos.cli.result import Result
from halos.cli.resume import AUTO, asked
from halos.cli.status import FAILED, refuse
from halos.config import renamed_keys
from halos.config.overrides import Override, check_choices, quote_nested, unreadable
from halos.config.secrets import refuse_secrets
from halos.distributed.children import exit_process
from halos.distributed.environment import count_from_environment, refuse_partial_launch, world_size
from halos.distributed.signals import exit_on_stop_signal, restore_signals_and_argv
from halos.errors import JobsFailedError, UserError, read_enough
from halos.repository import COMMAND


def main() -> None:
    """Ends with the run's exit status."""
    exit_on_stop_signal()
    try:
        exit_process(begin(sys.argv[1:]))
    except UserError as error:
        exit_process(refuse(error))
    except JobsFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(read_enough())


def start(argv: Sequence[str]) -> int:
    """A command within a process of yours: its exit status. Raises UserError; signals and sys.argv are afterwards as before."""
    with restore_signals_and_argv():
        return begin(argv)


def one_run(overrides: Sequence[str]) -> Result:
    """The same for one run, and what became of it. Raises UserError for options, too: there is no sweep here, and no help."""
    if options := [word for word in overrides if word.startswith("-")]:
        raise UserError(f"{options[0]} is an option of the command line: train() takes overrides, as in train(['loss=dpo'])")
    with restore_signals_and_argv():
        refuse_partial_launch()
        refuse_secrets({}, overrides)
        tree, quoted = ConfigTree(), _by_todays_names(overrides)
        typed = [parse(text, tree.choices) for text in quoted]
        check_choices(typed, tree.choices, multirun=False)
        if hydras := [one.text for one in typed if one.is_hydra]:
            raise UserError(f"{hydras[0]}: Hydra's own keys belong to the command line")
        return _run(typed, quoted, tree)


def begin(argv: Sequence[str]) -> int:
    """What was typed is checked before Hydra takes over, because Hydra's own errors exit 1 with tracebacks or bad advice."""
    args, unknown = get_args_parser().parse_known_intermixed_args(argv)
    if unknown:
        raise UserError(unreadable(unknown[0], "an option that does not exist"))
    flags = [word for word in argv if word not in args.overrides]
    overrides = _by_todays_names(args.overrides)
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
    typed = [parse(text, tree.choices) for text in overrides]
    check_choices(typed, tree.choices, multirun=multirun)
    goes_on = asked(typed) not in (None, AUTO)
    if multirun and goes_on:
        raise UserError("resume= goes on with one run, so it cannot be part of a sweep: leave out -m")
    if multirun:
        return sweep.sweep(typed, overrides, flags, tree)
    if not goes_on and (args.help or args.cfg or args.info or any(one.is_hydra for one in typed)):
        return sweep.through_hydra(typed, flags, tree)
    return _run(typed, overrides, tree).exit_status


def _by_todays_names(words: Sequence[str]) -> list[str]:
    """Overrides as Hydra's grammar takes them; who types an old name is told the new one."""
    if (note := renamed_keys.deprecation_note(words)) and not count_from_environment("LOCAL_RANK", 0):
        print(note, file=sys.stderr)
    return [quote_nested(renamed_keys.rename_override(word)) for word in words]


def _run(typed: Sequence[Override], overrides: Sequence[str], tree: ConfigTree) -> Result:
    """A new run, or the one that resume= names."""
    path = asked(typed)
    return single.begin(typed, tree) if path in (None, AUTO) else single.go_on(path, typed, overrides, tree)
