"""A single run: compose its configuration once, check it, and train."""

from __future__ import annotations

from collections.abc import Sequence

from halos.cli import online
from halos.cli.compose import ConfigTree
from halos.cli.result import Result
from halos.cli.resume import AUTO, begin_where_none, continue_if_started, load_run
from halos.config import validate
from halos.config.overrides import Override
from halos.config.resume_policy import LENGTH, Change
from halos.config.schema import Config
from halos.errors import UserError


def start(parsed: Sequence[Override], tree: ConfigTree) -> Result:
    """Start a new run; with resume=auto resume the run of the same name if it exists."""
    config, overrides = _configured(parsed, tree)
    changed = continue_if_started(config, overrides) if config.resume == AUTO else []
    return _result(config, run(config, overrides, changed, tree))


def asks_no_more(parsed: Sequence[Override], tree: ConfigTree) -> bool:
    """Return whether resume=auto would find that the run of this name, if it is finished, is what is asked for. A start that
    would be refused asks for another."""
    try:
        config, overrides = _configured(parsed, tree)
        changes = [] if config.overwrite else continue_if_started(config, overrides)
    except UserError:
        return False
    safe = all(change.why is None and change.key not in LENGTH for change in changes)
    return not config.overwrite and (safe if config.online is None else not changes)


def _configured(parsed: Sequence[Override], tree: ConfigTree) -> tuple[Config, list[str]]:
    """Compose and check a new run; also returns its overrides with resolved keys."""
    composed, resolved = tree.compose_parsed(parsed)
    begin_where_none(composed)
    overrides = [one.text for one in resolved]
    config = validate.check(composed, overrides, tree.choices)
    config.loss_choice = tree.own_choice(config)
    if is_live(config):
        config = online.live_config(config, overrides, tree)
    return config, overrides


def resume(path: str, parsed: Sequence[Override], overrides: Sequence[str], tree: ConfigTree) -> Result:
    """Resume the run that resume= names, with overrides on top."""
    config, changed = load_run(path, parsed, tree)
    return _result(config, run(config, overrides, changed, tree))


def _result(config: Config, status: int) -> Result:
    return Result.of(config.run_dir, status, dry=config.dry_run)


def is_live(config: Config) -> bool:
    """Return whether this is a live loop: it samples at every step, and runs as an ordinary run."""
    return config.online is not None and config.online.steps is not None


def run(config: Config, overrides: Sequence[str], changed: Sequence[Change], tree: ConfigTree) -> int:
    """Train, or run online rounds; return the exit status."""
    if validate.is_online_run(config):
        return online.run_rounds(config, overrides, changed, tree)
    from halos.run import run as assemble_and_train  # here: it imports torch, which --help and wrong input should not wait for

    return assemble_and_train(config, list(overrides), changed)
