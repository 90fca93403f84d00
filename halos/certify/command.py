"""The command line: python -m halos.losses.certify LOSS [KEY=VALUE ...]."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from halos.certify import page, subjects
from halos.certify.certificate import certify
from halos.config.plugins import make_importable
from halos.confined import write_whole
from halos.errors import UserError

NUMBER = re.compile(r"[+-]?\d+(\.\d*)?e[+-]?\d+")  # 1e-3, which YAML takes for text
WRITERS = {".md": page.markdown, ".html": page.html}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the certificate of each loss to the terminal; exit status 1 where one fails."""
    options = parser().parse_args(arguments)
    overrides = dict(_override(each) for each in options.losses if "=" in each)
    names = [each for each in options.losses if "=" not in each]
    names = subjects.choices() if names == ["all"] else names
    if not names or (overrides and len(names) > 1):
        raise UserError("KEY=VALUE goes with one LOSS" if overrides else "no LOSS is named: a choice of config/loss, or all")
    if options.output is not None and options.output.suffix not in WRITERS:
        raise UserError(f"--output {options.output}: it ends in {' or '.join(WRITERS)}")
    make_importable(options.plugins)
    certificates = []
    for name in names:
        certificates.append(certify(subjects.named(name, overrides, options.plugins, options.examples)))
        sys.stdout.write(page.text(certificates[-1]) + ("\n\n" if len(names) > 1 else "\n"))
    if options.output is not None:
        _write(options.output, WRITERS[options.output.suffix](certificates))
    if options.json is not None:
        _write(options.json, json.dumps(page.as_json(certificates), indent=1) + "\n")
    bad = [each.loss.name for each in certificates if not each.passes]
    if len(names) > 1:
        but = f"; not {', '.join(bad)}" if bad else ""
        sys.stdout.write(f"{len(names) - len(bad)} of {len(names)} losses pass{but}\n")
    return 1 if bad else 0


def parser() -> argparse.ArgumentParser:
    what, prog = "Prove a loss, ours or yours, without a model.", "python -m halos.losses.certify"
    options = argparse.ArgumentParser(prog=prog, description=what)
    loss = "a choice of config/loss, all, or the dotted path of a function of yours; then its keys, as KEY=VALUE"
    options.add_argument("losses", nargs="+", metavar="LOSS", help=loss)
    options.add_argument("--plugins", nargs="+", default=[], metavar="PACKAGE", help="packages of yours that may be imported")
    options.add_argument("--examples", type=Path, metavar="FILE", help="worked examples in YAML, in place of EXAMPLES")
    options.add_argument("--output", type=Path, metavar="PAGE", help="write the page as Markdown or HTML: PAGE.md, PAGE.html")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the evidence as JSON")
    return options


def _override(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        read = yaml.safe_load(value)
        return key.removeprefix("loss."), float(read) if isinstance(read, str) and NUMBER.fullmatch(read) else read
    except yaml.YAMLError as error:
        raise UserError(f"{text}: the value is no YAML") from error


def _write(path: Path, content: str) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
