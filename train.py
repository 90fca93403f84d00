"""Compose, check, build, fit: `python train.py loss=dpo model=tiny data=arithmetic exp_name=demo`. The only file that imports hydra."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from halos.config import gate, saved
from halos.config.overrides import Choices, Typed, check_choices, settle, unreadable
from halos.config.schema import Config
from halos.config.secrets import redact, refuse_secrets
from halos.errors import UserError
from halos.rundir import RunDir, job_name

ROOT = Path(__file__).resolve().parent
VERSION = "1.3"  # of Hydra's behaviour
WRONG_INPUT = 2


def main() -> None:
    """Ends with the run's exit status."""
    try:
        sys.exit(start(sys.argv[1:]))
    except UserError as error:
        sys.exit(refuse(error))
    except KeyboardInterrupt:
        sys.exit(130)


def refuse(error: UserError) -> int:
    """One message, from one rank. The others wait, so that the launcher does not end rank 0 before it spoke."""
    if int(os.environ.get("RANK") or 0):
        time.sleep(2)
    else:
        print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
    return WRONG_INPUT


def start(argv: list[str]) -> int:
    """What was typed is checked before Hydra takes over, because Hydra's own errors exit 1 with tracebacks or bad advice."""
    args, unknown = get_args_parser().parse_known_intermixed_args(argv)
    if unknown:
        raise UserError(unreadable(unknown[0], "") if unknown[0].startswith("--") else f"there is no option {unknown[0]}; try --help")
    flags = [word for word in argv if word not in args.overrides]
    if args.hydra_help or args.shell_completion or args.experimental_rerun:
        return enter_hydra(flags + args.overrides)
    multirun = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
    if multirun and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError(
            "a sweep cannot run inside accelerate launch, where the second job would fail:"
            " python train.py -m ... hydra/launcher=accelerate starts each job with its own accelerate launch"
        )
    refuse_secrets({}, args.overrides)
    typed = [parse(text) for text in args.overrides]
    resume = next((one.values[0] for one in typed if one.key == "resume" and one.values), None)
    if resume is not None and multirun:
        raise UserError("resume= goes on with one run, so it cannot be part of a sweep: leave out -m")
    config_dir = str((ROOT / (args.config_path or "config")).resolve())
    with hydra.initialize_config_dir(config_dir, version_base=VERSION):
        choices = list_choices()
        check_choices(typed, choices, multirun=multirun)
        if resume is not None:
            return run(resumed(str(resume), typed, choices), args.overrides)
        name = args.config_name or "config"
        searched = [f"hydra.searchpath=['file://{Path(args.config_dir).resolve()}']"] if args.config_dir else []
        known = keys(compose(name, searched + [first_of(one) for one in typed if one.chooses(choices)]))
        settled = settle(typed, choices, known)
        compose(name, searched + [first_of(one) for one in settled])
    return enter_hydra(flags + [one.text for one in settled])


def parse(text: str) -> Typed:
    """One override, read by Hydra's parser."""
    try:
        override = OverridesParser.create().parse_override(text)
        sweep = override.is_sweep_override()
        if not sweep:
            values: tuple[Any, ...] = () if override.value_type is None else (override.value(),)
        else:
            values = () if override.is_interval_sweep() or "glob(" in text else tuple(override.sweep_iterator())
    except HydraException as error:
        raise UserError(unreadable(text, str(error).strip().splitlines()[-1])) from error
    sign = text[: len(text) - len(text.lstrip("+~"))]
    return Typed(sign, override.key_or_group, override.package, text.partition("=")[2], values, sweep)
