"""A run's configuration on disk: resolved when written, plain values when read, so that it runs no code."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from halos.config.schema import Config
from halos.errors import UserError


def dump(config: Config) -> str:
    """What goes into config.yaml."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=10_000)


def load(text: str, run_dir: str, resume: str) -> DictConfig:
    """The configuration of the run in `run_dir`, to go on where it lies now.

    What must be typed on this command is not taken from the file: plugins, overwrite, dry_run.
    """
    try:
        node = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{run_dir}/config.yaml cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(node, dict):
        raise UserError(f"{run_dir}/config.yaml holds no configuration")
    own = {"run_dir": run_dir, "resume": resume, "plugins": [], "overwrite": False, "dry_run": False}
    saved = OmegaConf.create(_literal({**node, **own}))
    assert isinstance(saved, DictConfig)
    return saved


def _literal(node: Any) -> Any:
    """`${` escaped: what was saved is resolved already, and a stranger's file must not interpolate our environment."""
    if isinstance(node, dict):
        return {name: _literal(value) for name, value in node.items()}
    if isinstance(node, list):
        return [_literal(value) for value in node]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", node) if isinstance(node, str) else node
