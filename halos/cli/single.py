"""One run: composed once, checked, and handed to the room that trains."""

from __future__ import annotations

from collections.abc import Sequence

from halos.cli import online
from halos.cli.compose import ConfigTree
from halos.cli.result import Result
from halos.cli.resume import AUTO, resumed, take_up
from halos.config import validate
from halos.config.overrides import Override
from halos.config.resume_policy import Change
from halos.config.schema import Config


def begin(typed: Sequence[Override], tree: ConfigTree) -> Result:
    """What was typed as a new run, or with resume=auto as the run of its name that is there."""
    composed, settled = tree.compose_typed(typed)
    overrides = [one.text for one in settled]
    config = validate.check(composed, overrides, tree.choices)
    if is_live(config):
        config = online.live(config, overrides, tree)
    changed = take_up(config, overrides) if config.resume == AUTO else []
    return _ended(config, run(config, overrides, changed, tree))


def go_on(path: str, typed: Sequence[Override], overrides: Sequence[str], tree: ConfigTree) -> Result:
    """What resume= names, with what was typed on top."""
    config, changed = resumed(path, typed, tree)
    return _ended(config, run(config, overrides, changed, tree))


def _ended(config: Config, status: int) -> Result:
    return Result.of(config.run_dir, status, dry=config.dry_run)


def is_live(config: Config) -> bool:
    return config.online is not None and config.online.steps is not None


def run(config: Config, overrides: Sequence[str], changed: Sequence[Change], tree: ConfigTree) -> int:
    """The exit status of the run itself, or of the rounds."""
    if validate.is_online_run(config):
        return online.rounds(config, overrides, changed, tree)
    from halos.run import run as assemble_and_train  # here: it imports torch, which --help and wrong input need not wait for

    return assemble_and_train(config, list(overrides), changed)
