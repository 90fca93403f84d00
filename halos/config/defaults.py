"""Sections of config/*.yaml as dataclasses, with the YAML's words on each key: for commands that Hydra does not compose."""

from __future__ import annotations

import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from halos.config.schema import Feedback, Sampler, Scorer
from halos.repository import CONFIG

Section = TypeVar("Section")
LOCATIONS: dict[type, tuple[str, str]] = {  # the file, and the key in it
    Sampler: ("loss/online.yaml", "online.sampler"), Scorer: ("loss/online.yaml", "online.scorer"),
    Feedback: ("loss/online.yaml", "online.feedback"),
}  # fmt: skip
_LINE = re.compile(r"( *)(\w+):[^#]*(?:# (.*))?")


def section(schema: type[Section], **changed: Any) -> Section:
    """A section with the values of its YAML, but for those that are `changed`."""
    file, name = LOCATIONS[schema]
    node = _read(CONFIG / file)
    for part in name.split("."):
        node = node[part]
    return schema(**{**node, **changed})


def help_texts(schema: type) -> dict[str, str]:
    """What the YAML says beside each key of a section."""
    file, name = LOCATIONS[schema]
    said: dict[str, str] = {}
    path: list[str] = []
    for line in (CONFIG / file).read_text(encoding="utf-8").splitlines():
        if (found := _LINE.fullmatch(line)) is None:
            continue
        path = [*path[: len(found[1]) // 2], found[2]]
        said[".".join(path)] = found[3] or ""
    return {each.name: said[f"{name}.{each.name}"] for each in fields(schema)}  # type: ignore[arg-type]


@cache
def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))
