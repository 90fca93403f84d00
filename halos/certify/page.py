"""The page of a certificate: as a table in the terminal, as Markdown or HTML in a file, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from halos.certify.certificate import Certificate
from halos.errors import one_line
from halos.inspection.html import joined, table, tag
from halos.inspection.style import STYLE
from halos.versions import versions

WIDTH = 120


def title(certificate: Certificate) -> str:
    spec = certificate.loss.spec
    keys = "".join(f" {name}={value}" for name, value in spec.settings.items())
    bounds = certificate.loss.humanline
    under = f", humanline.low={bounds.low:g} humanline.high={bounds.high:g}" if bounds is not None else ""
    return f"{certificate.loss.name}: {certificate.loss.target} of {spec.inputs.__name__}{keys}{under}"


def verdict(certificate: Certificate) -> str:
    bad = [check.name for check in certificate.checks if check.verdict == "FAIL"]
    return f"FAILS: {', '.join(bad)}" if bad else "passes"


def text(certificate: Certificate) -> str:
    """For a terminal: one line a check, wrapped."""
    lines = [title(certificate)]
    for check in certificate.checks:
        start = f"  {check.verdict:6s}  {check.name:18s}  "
        lines.append(textwrap.fill(one_line(check.evidence), WIDTH, initial_indent=start, subsequent_indent=" " * len(start)))
    return "\n".join([*lines, f"{certificate.loss.name} {verdict(certificate)}"])


def markdown(certificates: Sequence[Certificate]) -> str:
    parts = [_versions(), *(_summary(certificates) if len(certificates) > 1 else ())]
    for certificate in certificates:
        rows = [f"| {check.verdict} | {check.name} | {_cell(check.evidence)} |" for check in certificate.checks]
        head = "| | check | evidence |\n| --- | --- | --- |"
        alive = [f"- `{each}`" for each in certificate.alive]
        alive = ["", "Mutants that give its worked numbers too:", "", *alive] if alive else []
        parts.append("\n".join([f"## {certificate.loss.name}", "", f"{_cell(title(certificate))}", "", head, *rows, *alive]))
    return "\n\n".join(parts) + "\n"


def _summary(certificates: Sequence[Certificate]) -> Iterable[str]:
    yield "\n".join(["| loss | |", "| --- | --- |", *(f"| {each.loss.name} | {verdict(each)} |" for each in certificates)])


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|")


def html(certificates: Sequence[Certificate]) -> str:
    body = []
    for certificate in certificates:
        rows = [(check.name, check.verdict, check.evidence) for check in certificate.checks]
        alive = tag("ul", *(tag("li", each) for each in certificate.alive))
        more = [tag("p", "Mutants that give its worked numbers too:"), alive] if certificate.alive else []
        body.append(
            tag("section", tag("h2", certificate.loss.name), table(title(certificate), ("check", "", "evidence"), rows), *more)
        )
    head = tag("head", tag("meta", charset="utf-8"), tag("title", "halos.losses.certify"), tag("style", STYLE))
    whole = tag("html", head, tag("body", tag("h1", "Losses"), tag("p", _versions()), joined(body)), lang="en")
    return f"<!doctype html>\n{whole}\n"


def as_json(certificates: Sequence[Certificate]) -> list[dict[str, Any]]:
    return [
        {
            "loss": each.loss.name, "target": each.loss.target, "settings": each.loss.spec.settings,
            "humanline": each.loss.humanline and asdict(each.loss.humanline), "passes": each.passes,
            "checks": [{"name": check.name, "verdict": check.verdict, "evidence": check.evidence} for check in each.checks],
            "mutants_alive": list(each.alive),
        }
        for each in certificates
    ]  # fmt: skip


def _versions() -> str:
    known = versions()
    return f"halos {known['halos']}, torch {known['packages'].get('torch')}: python -m halos.losses.certify"
