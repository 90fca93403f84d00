"""Compose configurations with Hydra: the directories, the choices in them, and errors as one message."""

from __future__ import annotations

import pickle
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
from halos.config.schema import Config
from halos.errors import UserError
from halos.repository import CONFIG, LAUNCH, ROOT

sys.path.append(str(LAUNCH))  # hydra_plugins/ in it is where Hydra looks for launchers
VERSION = "1.3"  # of Hydra's behaviour
PLUGINS = {"optuna": "hydra-optuna-sweeper", "submitit": "hydra-submitit-launcher"}  # names on PyPI


@dataclass(frozen=True)
class ConfigTree:
    """The directories with configuration files, ours first, and the name of the primary one."""

    directories: tuple[Path, ...] = (CONFIG,)
    name: str = "config"

    @classmethod
    def of_options(cls, config_path: str | None, config_dir: str | None, name: str | None) -> ConfigTree:
        """Apply Hydra's options of the same names. Raises UserError for a directory that does not exist."""
        if config_dir is not None and not Path(config_dir).is_dir():
            raise UserError(f"--config-dir: there is no directory {config_dir}")
        own = (ROOT / (config_path or "config")).resolve()
        return cls((own, *([Path(config_dir).resolve()] if config_dir is not None else [])), name or "config")

    @cached_property
    def choices(self) -> Choices:
        """The options of every config group but Hydra's own."""
        options: dict[str, list[str]] = {"experiment": []}
        for directory in self.directories:
            for file in sorted(directory.glob("*/**/*.yaml")):
                group = file.parent.relative_to(directory).as_posix()
                if group.partition("/")[0] != "hydra":
                    options.setdefault(group, []).append(file.stem)
        return options

    @cached_property
    def _composed(self) -> dict[tuple[str, ...], bytes]:
        return {}

    @property
    def searchpath(self) -> list[str]:
        """The override that makes Hydra search the other directories."""
        return [f"hydra.searchpath=['file://{directory}']" for directory in self.directories[1:]]

    def initialized(self) -> AbstractContextManager[Any]:
        """Initialize Hydra for these directories, unless it is already, as in a sweep's jobs."""
        if GlobalHydra.instance().is_initialized():
            return nullcontext()
        return hydra.initialize_config_dir(str(self.directories[0]), version_base=VERSION)

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Compose a configuration; its `loss_choice` is that of config/loss. Raises UserError if Hydra cannot.

        One command may ask for the same several times (jobs of a sweep, the training of each round), and Hydra takes an eighth of
        a second: a tree composes it once.
        """
        if (before := self._composed.get(tuple(overrides))) is not None:
            return pickle.loads(before)
        with self.initialized():
            try:
                composed = hydra.compose(self.name, [*self.searchpath, *overrides], return_hydra_config=True)
            except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
                raise UserError(explain(error)) from error
        with open_dict(composed):
            composed["loss_choice"] = composed.pop("hydra").runtime.choices.get("loss")
        self._composed[tuple(overrides)] = pickle.dumps(composed)
        return composed

    def compose_parsed(self, parsed: Sequence[Override]) -> tuple[DictConfig, list[Override]]:
        """Compose once with the choices, then set the values. Also returns the overrides with resolved keys."""

        def is_for_hydra(one: Override) -> bool:
            return one.is_hydra or one.chooses(self.choices)

        composed = self.compose([one.text for one in parsed if is_for_hydra(one)])
        resolved = resolve_keys(parsed, self.choices, keys(composed))
        set_values(composed, [one for one in resolved if not is_for_hydra(one)])
        return composed, resolved

    def own_choice(self, config: Config) -> str | None:
        """Return the choice of config/loss, by the overrides or by an experiment among them; None where the run's loss function
        is not the choice's own."""
        choice = config.loss_choice
        return choice if choice is not None and self._target_of(choice) == config.loss.get("_target_") else None

    def _target_of(self, choice: str) -> object:
        """Return loss._target_ of config/loss/CHOICE.yaml or of the choices that it extends; None where they have none."""
        files = [path for each in self.directories if (path := each / "loss" / f"{choice}.yaml").is_file()]
        node = plain(OmegaConf.load(files[0])) if files else {}
        if (target := (node.get("loss") or {}).get("_target_")) is not None:
            return target
        bases = [name.rpartition("/")[2] for name in node.get("defaults", ()) if isinstance(name, str) and name != "_self_"]
        return next((target for name in reversed(bases) if (target := self._target_of(name)) is not None), None)


def set_values(composed: DictConfig, resolved: Sequence[Override]) -> None:
    """Apply value overrides to a composed configuration, as Hydra would. Raises UserError for unknown keys."""
    try:
        for one in resolved:
            parent, _, name = one.key.rpartition(".")
            if parent and not name.isdecimal() and OmegaConf.is_list(OmegaConf.select(composed, parent)):
                raise UserError(f"{one.key}: {parent} is a list, which has no key {name!r}: give all of it, {parent}=[...]")
            with open_dict(composed) if one.sign else nullcontext():
                if one.sign == "~":
                    del OmegaConf.select(composed, parent)[name]
                else:
                    validate.refuse_other_container(one.key, one.values[0])
                    OmegaConf.update(composed, one.key, one.values[0], merge=True)
    except OmegaConfBaseException as error:
        raise UserError(explain(error, keys(composed))) from error


def keys(composed: DictConfig) -> list[str]:
    """Return every key of a configuration, dotted, sections included."""

    def within(node: Any, prefix: str) -> Iterator[str]:
        for name, value in node.items() if isinstance(node, dict) else ():
            yield f"{prefix}{name}"
            yield from within(value, f"{prefix}{name}.")

    return list(within(plain(composed), ""))


def plain(node: Any) -> Any:
    """Convert to plain lists and dicts, interpolations unresolved."""
    return OmegaConf.to_container(node)


def explain(error: Exception, known: Sequence[str] = ()) -> str:
    """Turn an error of Hydra (without its search paths) or OmegaConf into one message; `known` are keys to suggest."""
    cause = error.__cause__ or error
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return validate.explain(cause, OmegaConf.create(), known)
    lines = str(error).partition("onfig search path")[0].partition("Search path:")[0].strip().splitlines()
    text = "; ".join(line.strip() for line in lines if line.strip() and line.strip() != "C") or type(cause).__name__
    missing = next((package for name, package in PLUGINS.items() if f"er/{name}" in text), None)
    return f"{text}; it comes with the package {missing}: pip install {missing}" if missing else text
