"""Verify a run's own small files (config.yaml, attempts, metrics, results) against their seals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos import confined, seals
from halos.checkpoint import lineage, manifest, select
from halos.config import arithmetic_version, legacy_sections, resume_policy, run_config
from halos.config.resume_policy import Change
from halos.config.schema import Scope, keys_of
from halos.errors import UserError
from halos.hashes import short
from halos.rundir import RunDir

NO_SEAL = "ok (an older version wrote it, under no seal)"
OF_HOST = keys_of(Scope.HOST)
UNSEALED = ("good.json", "forward_report.json", "online.json", "hooks.json")  # checked only for being readable JSON


def changed(run: RunDir) -> list[Change]:
    """Return the keys that were changed by hand since the newest checkpoint sealed them; without one, the changed files."""
    text, records = run.read_config(), run.read_attempts()
    broken, newest = seals.faults(text, records), _newest(run)
    if newest is not None:
        path, last = newest
        faults = "".join(f"; {name}: {reason}" for name, reason in broken.items())
        return _changed_keys(run, text, records, last, f"the first is sealed in {path}{faults}")
    why = "changed after it was written, and no checkpoint says what it said"
    return [Change(f"{name} (content)", "as written", short(seals.digest(records.get(name, text))), why) for name in broken]


def _newest(run: RunDir) -> tuple[Path, Mapping[str, Any]] | None:
    """Return the newest checkpoint or FINAL whose lineage has an unbroken seal, and the last run of that lineage."""
    for path in [*reversed(select.checkpoints(run.checkpoints)), run.final]:
        is_whole = path.is_dir() and not manifest.verify(path, only=("lineage.json",))
        if is_whole and not _is_of_online_round(path) and (chain := _read(path)) is not None:
            return path, chain["runs"][-1]
    return None


def _is_of_online_round(path: Path) -> bool:
    """Whether an online run copied this FINAL from its last round: its lineage ends with that round's training."""
    listing = manifest.read(path)
    return not isinstance(listing, manifest.Fault) and "rounds" in listing


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return lineage.read(path)
    except UserError:
        return None


def _record(last: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attempt and the metrics that a checkpoint was saved after; entries of a wrong type are dropped."""
    record = last["result"].get("record")
    record = record if isinstance(record, dict) else {}
    attempt, metrics = record.get("attempt"), record.get("metrics")
    valid: dict[str, Any] = {"attempt": attempt} if type(attempt) is int else {}
    if isinstance(metrics, dict) and type(metrics.get("rows")) is int and isinstance(metrics.get("sha256"), str):
        valid["metrics"] = metrics
    return valid


def _changed_keys(run: RunDir, text: str, records: Mapping[str, str], last: Mapping[str, Any], why: str) -> list[Change]:
    """Compare the configuration on the disk, as of the attempt that sealed it, with the sealed one."""
    attempt = _record(last).get("attempt")
    names = list(records)
    until = names if attempt is None else [name for name in names if int(name.removesuffix(".yaml")) <= attempt]
    settings, sealed_settings = (
        run_config.load(text, {name: records[name] for name in until}, str(run.path)),
        dict(last["config"]),
    )
    legacy_sections.upgrade(sealed_settings)
    if arithmetic_version.recorded_version(last.get("content")) < arithmetic_version.CISPO_BOUNDED_BELOW:
        legacy_sections.drop_unread_clip_low(sealed_settings)
    later = {
        key for name in (names if attempt is None else names[len(until) :]) for key in run_config.changed_keys(records[name])
    }
    altered = []
    for key in resume_policy.ON_RESUME:
        current, sealed = resume_policy.value_at(settings, key), resume_policy.value_at(sealed_settings, key)
        if key in OF_HOST or not resume_policy.has_key(sealed_settings, key):
            continue
        pairs = resume_policy.differences(key, sealed, current)
        altered += [Change(name, old, new, why) for name, old, new in pairs if not {name, key} & later]
    return altered


# --- a report on all files --------------------------------------------------------------------------------------------


def report(run: RunDir) -> dict[str, str]:
    """Return for each file `ok` or what is wrong with it; every sealed byte is checked."""
    findings = _configuration(run)
    if (run.path / "metrics.jsonl").is_file():
        findings["metrics.jsonl"] = _metrics(run)
    if (run.path / "result.json").is_file():
        findings["result.json"] = {True: "ok", False: seals.CHANGED, None: NO_SEAL}[run.result.is_intact()]
    if run.commits.path.is_file():
        findings[run.commits.path.name] = run.commits.read().fault or "ok"
    for name in UNSEALED:
        if (run.path / name).is_file():
            findings[name] = _readable(run.path / name)
    for facts in sorted(run.path.glob("**/*.meta.json")):  # of online rounds, and of the evaluation after the last
        findings |= _stage_file(facts, run.path)
    return findings


def _stage_file(facts: Path, run: Path) -> dict[str, str]:
    """Check the rows that a stage wrote against the hash in `facts`."""
    rows = facts.with_name(facts.name.replace(".meta.json", ".jsonl"))
    name = rows.relative_to(run).as_posix()
    if not rows.is_file():
        return {}
    try:
        return {name: {True: "ok", False: seals.CHANGED, None: NO_SEAL}[seals.rows_are_intact(rows, facts)]}
    except UserError as error:
        return {name: str(error)}


def _configuration(run: RunDir) -> dict[str, str]:
    """Check config.yaml and the attempts, as far as they can be read."""
    texts, findings = dict[str, str](), dict[str, str]()
    for path in (run.config, *run.attempts()):
        name = path.relative_to(run.path).as_posix()
        try:
            texts[name] = confined.read_text(path, within=run.path)
        except UserError as error:
            findings[name] = str(error)
    records = {name.removeprefix("attempts/"): text for name, text in texts.items() if name != "config.yaml"}
    faults = seals.faults(texts.get("config.yaml", ""), records)
    is_old = all(seals.is_whole(record) is None for record in records.values())
    for name in texts:
        findings[name] = faults.get(name.removeprefix("attempts/"), NO_SEAL if is_old else "ok")
    if all(each.startswith("ok") for each in findings.values()):
        for change in changed(run):
            findings["config.yaml"] = f"{change} ({change.why})"
    return findings


def _metrics(run: RunDir) -> str:
    if damaged := run.metrics.damaged():
        return f"{len(damaged)} of its lines cannot be read"
    newest = _newest(run)
    sealed = _record(newest[1]).get("metrics") if newest is not None else None
    if sealed is None:
        return "ok (its lines can be read; none is under a seal)"
    rows, digest = run.metrics.digest(sealed["rows"])
    if rows < sealed["rows"]:
        return f"{rows} lines instead of {sealed['rows']}"
    if digest != sealed["sha256"]:
        return f"{seals.CHANGED} in its first {sealed['rows']} lines"
    return f"ok ({rows} lines are sealed)"


def _readable(path: Path) -> str:
    try:
        confined.load_json(path)
    except UserError as error:
        return str(error)
    return "ok (it can be read)"
