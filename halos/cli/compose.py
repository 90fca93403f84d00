"""Where configurations are read from, and Hydra's composition of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from halos.config import validate
from halos.config.overrides import Choices, Override, resolve_keys
from halos.errors import UserError
from halos.repository import CONFIG, LAUNCH, ROOT

sys.path.append(str(LAUNCH))  # hydra_plugins/ in it is where Hydra looks for launchers
VERSION = "1.3"  # of Hydra's behaviour
PLUGINS = {"optuna": "hydra-optuna-sweeper", "submitit": "hydra-submitit-launcher"}  # what pip calls them


@dataclass(frozen=True)
class ConfigTree:
    """The directories that hold configurations, ours first, and the one that is composed."""

    directories: tuple[Path, ...] = (CONFIG,)
    name: str = "config"

    @classmethod
    def of_options(cls, config_path: str | None, config_dir: str | None, name: str | None) -> ConfigTree:
        """As Hydra's options of the same names say. Raises UserError for a directory that is not there."""
        if config_dir is not None and not Path(config_dir).is_dir():
            raise UserError(f"--config-dir: there is no directory {config_dir}")
        own = (ROOT / (config_path or "config")).resolve()
        return cls((own, *([Path(config_dir).resolve()] if config_dir is not None else [])), name or "config")

    @cached_property
    def choices(self) -> Choices:
        """The options of every group of ours."""
        options: dict[str, list[str]] = {"experiment": []}
        for directory in self.directories:
            for file in sorted(directory.glob("*/**/*.yaml")):
                group = file.parent.relative_to(directory).as_posix()
                if group.partition("/")[0] != "hydra":
                    options.setdefault(group, []).append(file.stem)
        return options

    @property
    def searchpath(self) -> list[str]:
        """What has Hydra look into the directories that are not ours."""
        return [f"hydra.searchpath=['file://{directory}']" for directory in self.directories[1:]]

    def opened(self) -> AbstractContextManager[Any]:
        """Inside, Hydra composes from here; a sweep's jobs are inside already."""
        if GlobalHydra.instance().is_initialized():
            return nullcontext()
        return hydra.initialize_config_dir(str(self.directories[0]), version_base=VERSION)

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Raises UserError for what Hydra does not compose."""
        with self.opened():
            try:
                return hydra.compose(self.name, [*self.searchpath, *overrides])
            except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
                raise UserError(explain(error)) from error

    def compose_typed(self, typed: Sequence[Override]) -> tuple[DictConfig, list[Override]]:
        """One composition for what was typed, and that as it was settled: Hydra takes the choices, values follow."""

        def is_hydras(one: Override) -> bool:
            return one.is_hydra or one.chooses(self.choices)

        composed = self.compose([one.text for one in typed if is_hydras(one)])
        settled = resolve_keys(typed, self.choices, keys(composed))
        set_values(composed, [one for one in settled if not is_hydras(one)])
        return composed, settled


def set_values(composed: DictConfig, settled: Sequence[Override]) -> None:
    """Put values that were typed into a composed configuration, as Hydra would. Raises UserError for keys that it has not."""
    try:
        for one in settled:
            parent, _, name = one.key.rpartition(".")
            with open_dict(composed) if one.sign else nullcontext():
                if one.sign == "~":
                    del OmegaConf.select(composed, parent)[name]
                else:
                    OmegaConf.update(composed, one.key, one.values[0], merge=True)
    except OmegaConfBaseException as error:
        raise UserError(explain(error, keys(composed))) from error


def keys(composed: DictConfig) -> list[str]:
    """Every key that is there, dotted, sections included."""

    def within(node: Any, prefix: str) -> Iterator[str]:
        for name, value in node.items() if isinstance(node, dict) else ():
            yield f"{prefix}{name}"
            yield from within(value, f"{prefix}{name}.")

    return list(within(plain(composed), ""))


def plain(node: Any) -> Any:
    """Lists and mappings of Python, interpolations as they are written."""
    return OmegaConf.to_container(node)


def explain(error: Exception, known: Sequence[str] = ()) -> str:
    """Hydra's errors without its search paths, OmegaConf's in our words; `known` are keys that may be meant."""
    cause = error.__cause__ or error
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return validate.explain(cause, OmegaConf.create(), known)
    lines = str(error).partition("onfig search path")[0].partition("Search path:")[0].strip().splitlines()
    text = "; ".join(line.strip() for line in lines if line.strip() and line.strip() != "C") or type(cause).__name__
    missing = next((package for name, package in PLUGINS.items() if f"er/{name}" in text), None)
    return f"{text}; it comes with the package {missing}: pip install {missing}" if missing else text
