"""A table of runs in Markdown."""

import re
from collections.abc import Sequence

from halos import intervals
from halos.report.read import Record, series

# In this order, where a run has them; each run's objective is added.
METRICS = (
    "loss",
    "perplexity",
    "accuracy",
    "rewards/accuracies",
    "rewards/margins",
    "logps/accuracies",
    "kl",
    "reward",
    "win_rate",
    "entropy",
)


def table(records: Sequence[Record]) -> str:
    """Format one row per run. Metrics on the evaluation data: the first evaluation -> the last."""
    metrics = _shown(records)
    header = ["run", "loss", "model", "peft", "steps", "status", *[f"held-out {name}" for name in metrics], "time"]
    lines = [header, ["---"] * len(header)]
    for record in records:
        facts = [record.label, record.loss, _model(record), _peft(record), _steps(record), record.status]
        lines.append([*facts, *[_change(record, name) for name in metrics], _duration(record.seconds)])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _shown(records: Sequence[Record]) -> list[str]:
    reported = {name for record in records for row in record.evals for name in row}
    passes = sorted(name for name in reported if re.fullmatch(r"pass@\d+", name))
    wanted = [*METRICS, *passes, *[str(record.node("objective").get("metric")) for record in records]]
    return [name for name in dict.fromkeys(wanted) if name in reported]


def _model(record: Record) -> str:
    """Return a hub id as it is, a local path's last part, and for the final model of another run `run/FINAL`."""
    name = str(record.node("model").get("name_or_path") or "?").rstrip("/")
    local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    return "/".join(name.split("/")[-2 if name.endswith("/FINAL") else -1 :]) if local else name


def _peft(record: Record) -> str:
    peft = record.node("peft")
    return f"lora r={peft.get('r')}" if peft.get("name") == "lora" else str(peft.get("name", "?"))


def _steps(record: Record) -> str:
    if record.is_online_run:
        return "1 round" if record.step == 1 else f"{record.step} rounds"
    planned = record.node("train").get("steps")
    return f"{record.step} of {planned}" if planned and planned != record.step else str(record.step)


def _change(record: Record, name: str) -> str:
    """Format as `0.6931 → 0.412`, with the step of the first evaluation where that is not 0 and the interval of the last."""
    steps, values = series(record.evals, name)
    if not len(values):
        return ""
    first, last = _number(values[0]) + (f" (step {steps[0]:.0f})" if steps[0] else ""), _number(values[-1])
    row = next(row for row in reversed(record.evals) if name in row)
    bounds = [_number(row[name + end]) for end in (intervals.LOW, intervals.HIGH) if isinstance(row.get(name + end), float)]
    interval = f" ({' to '.join(bounds)})" if len(bounds) == 2 else ""
    return f"{first if len(values) == 1 else f'{first} → {last}'}{interval}"


def _number(value: float) -> str:
    return f"{value:.4g}" if value == value else "not finite"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
