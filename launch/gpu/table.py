"""gpu.json and gpu.md: what the suite has found."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEAD = ["| check | result | figure | expected |", "| --- | --- | --- | --- |"]

Row = Mapping[str, Any]  # name, status, figure, expected, seconds, data


def passed(rows: Sequence[Row]) -> bool:
    """Whether all checks passed; those that this card cannot run do not count, but one must have run besides `environment`."""
    ran = [row for row in rows if row["status"] != "skipped"]
    return all(row["status"] == "passed" for row in ran) and len(ran) > 1


def line(row: Row) -> str:
    cells = (row["name"], row["status"], row["figure"], row["expected"])
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def markdown(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """`about`: title, seconds, notes."""
    counts = [f"{sum(row['status'] == status for row in rows)} {status}" for status in ("passed", "failed", "skipped")]
    summary = f"{', '.join(counts)} in {about['seconds']:.0f} s"
    top = [f"# {about['title']}", "", summary, *(f"\n{note}" for note in about["notes"])]
    return "\n".join([*top, "", *HEAD, *map(line, rows), ""])


def write(directory: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    everything = {"passed": passed(rows), **about, "checks": list(rows)}
    (directory / "gpu.json").write_text(json.dumps(everything, indent=1) + "\n")
    (directory / "gpu.md").write_text(markdown(rows, about))
