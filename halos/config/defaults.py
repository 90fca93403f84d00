"""Sections of config/*.yaml as dataclasses, and the comment of each key as help text, for commands that do not use Hydra."""

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
LOCATIONS: dict[type, tuple[str, str]] = {  # file, and the section's key in it
    Sampler: ("loss/online.yaml", "online.sampler"), Scorer: ("loss/online.yaml", "online.scorer"),
    Feedback: ("loss/online.yaml", "online.feedback"),
}  # fmt: skip
_LINE = re.compile(r"( *)(\w+):[^#]*(?:# (.*))?")


def section(schema: type[Section], **changed: Any) -> Section:
    """Return a section with the values of its YAML, overridden by `changed`."""
    file, name = LOCATIONS[schema]
    node = _read(CONFIG / file)
    for part in name.split("."):
        node = node[part]
    return schema(**{**node, **changed})


def help_texts(schema: type) -> dict[str, str]:
    """Return the YAML comment of each key of a section."""
    file, name = LOCATIONS[schema]
    texts: dict[str, str] = {}
    path: list[str] = []
    for line in (CONFIG / file).read_text(encoding="utf-8").splitlines():
        if (match := _LINE.fullmatch(line)) is None:
            continue
        path = [*path[: len(match[1]) // 2], match[2]]
        texts[".".join(path)] = match[3] or ""
    return {each.name: texts[f"{name}.{each.name}"] for each in fields(schema)}  # type: ignore[arg-type]


@cache
def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))
