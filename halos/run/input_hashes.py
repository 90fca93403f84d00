"""Hash the inputs of a run (data, models, code) at its start, and compare them with those of its last start."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from halos.checkpoint import lineage, manifest, select, state
from halos.config import arithmetic_version, resume_policy, run_config
from halos.config.arithmetic_version import RunFacts
from halos.config.content_hashes import ContentHashes, compare
from halos.config.custom_formats import custom_formats
from halos.config.mixture_parts import is_mixture
from halos.config.plugins import code_hash
from halos.config.resume_policy import Change
from halos.config.rollout_modules import scorer_class
from halos.config.schema import Config, Data
from halos.data.custom_format import entries_of
from halos.data.dates import without_date
from halos.data.sources import content_hash
from halos.errors import UserError
from halos.hashes import json_hash
from halos.models.content_hashes import config_hashes, tokenizer_hashes
from halos.rundir import RunDir

log = logging.getLogger(__name__)


def read(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, str | None],
    *,
    base: Path,
    reference: Path | None,
) -> ContentHashes:
    """Hash all inputs. `rows` has the hashes of the tokenised data; `base` and `reference` are directories of weights."""
    cache = Path(config.cache_dir)
    hashes: dict[str, str | None] = {
        arithmetic_version.KEY: str(arithmetic_version.VERSION),
        **rows,
        **tokenizer_hashes("model", base, tokenizer, cache),
        "model.chat_template": json_hash(without_date(str(tokenizer.chat_template))),  # a date shows in those of rows
        **_model("model", base, cache),
        **_model("reference", reference, cache),
        "peft.init_from": None,
        **_scorer(config, cache),
        **code(config),
    }
    if config.peft.name == "lora" and config.peft.init_from is not None:
        hashes["peft.init_from"] = lineage.identity(Path(config.peft.init_from), cache)
    if config.optim["init_from"] is not None:
        optimizer = Path(config.optim["init_from"]) / "state" / "optimizer"
        gone = config.resume and not optimizer.is_dir()  # a run with checkpoints of its own no longer reads it
        hashes |= {} if gone else {"optim.init_from": lineage.identity(optimizer, cache)}
    return ContentHashes(hashes, {purpose: _sources(config.data, purpose) for purpose in ("train", "eval")})


def code(config: Config) -> dict[str, str | None]:
    """Hash the user's own code that a run computes with."""
    hashes = {f"{node}._target_": code_hash(target) if target else None for node, target in _targets(config).items()}
    if is_mixture(config.loss):
        own = {name: code_hash(part["_target_"]) for name, part in config.loss["parts"].items()}
        hashes["loss._target_"] = json_hash(own) if any(own.values()) else None
    if config.online is not None:
        scorer = config.online.scorer
        codes = scorer_class(scorer.name).code(scorer, plugins=config.plugins)
        hashes |= {f"online.scorer.{key}": value for key, value in codes.items()}
    return {**hashes, "data.format": _formats(config)}


def _formats(config: Config) -> str | None:
    """Hash the code of the user's own data formats."""
    codes = {target: code_hash(target) for target in custom_formats(config.data).values()}
    return json_hash(codes) if codes else None


def _targets(config: Config) -> dict[str, str | None]:
    """Return the targets that decide what a step computes, any of which may be the user's own code."""
    nodes = {"loss": config.loss, "optim": config.optim, "schedule": config.schedule, "trainer": config.trainer}
    return {name: node["_target_"] for name, node in nodes.items()}


def _model(name: str, directory: Path | None, cache: Path) -> dict[str, str | None]:
    weights = None if directory is None else lineage.identity(directory, cache)
    return {f"{name}.weights": weights, **config_hashes(name, directory)}


def _scorer(config: Config, cache: Path) -> dict[str, str | None]:
    """Hash the files and models that the scorer of an online run's samples reads."""
    if config.online is None:
        return {}
    scorer = config.online.scorer
    hashes = scorer_class(scorer.name).content(scorer, cache=cache)
    return {f"online.scorer.{key}": value for key, value in hashes.items()}


def _sources(data: Data, purpose: str) -> list[dict[str, Any]]:
    """Return the entries of data.train or data.eval as they are given, each with the hash of its content."""
    given = [dict(entry) if isinstance(entry, Mapping) else {"path": entry} for entry in getattr(data, purpose)]
    hashes = [content_hash(entry, purpose) for entry in entries_of(data, purpose)]  # data.reader is needed to open them
    return [{**{key: value for key, value in entry.items() if value is not None}, "hash": hashed}
            for entry, hashed in zip(given, hashes, strict=True)]  # fmt: skip


def changed(
    config: Config, computed: RunFacts, now: ContentHashes, tokens_until: Callable[[int], int | None] = lambda step: None
) -> list[Change]:
    """Return the inputs that differ from the last start's, and changes of the arithmetic. Raises UserError unless
    resume_changes=allow. `tokens_until(step)` counts the tokens before a step in the data as they are read now."""
    directory = RunDir(config.run_dir)
    if not directory.attempts() and not select.checkpoints(directory.checkpoints):
        return []  # its start ended before it was recorded, so that nothing was computed
    before = recorded(directory)
    since = _computed_with(directory, before)
    changes = [*_changed_content(config, before, now), *arithmetic_version.changes_since(since, computed)]
    if before is None or "data.train" not in before.hashes:
        changes += _changed_token_count(directory, tokens_until)
    if config.resume_changes == "refuse":
        resume_policy.refuse_unsafe(changes, directory.path)
    for line in arithmetic_version.notes_since(since, computed):
        log.info("other than where the run began: %s", line)
    return changes


def refuse_other_code(config: Config, directory: RunDir) -> None:
    """Raises UserError where a finished run was trained with other code of the user's than that of now, unless
    resume_changes=allow. Its data and models are not read for it."""
    before = recorded(directory)
    if before is None or config.resume_changes == "allow":
        return
    if changes := _changed_content(config, before, ContentHashes(code(config))):
        raise UserError(
            f"{directory.path} is finished, and was trained with other code: {'; '.join(map(str, changes))}. To train with that"
            " of now, give a new exp_name, or overwrite=true; to keep the run as it is, restore the code, or add"
            " resume_changes=allow"
        )


def _computed_with(directory: RunDir, before: ContentHashes | None) -> int:
    """Return the arithmetic version of a run, of its newest start, else of its newest checkpoint."""
    if before is not None and arithmetic_version.KEY in before.hashes:
        return arithmetic_version.recorded_version(before.hashes)
    saves = (manifest.read(path) for path in reversed(select.checkpoints(directory.checkpoints)))
    return next((arithmetic_version.recorded_version(listing) for listing in saves if isinstance(listing, dict)), 0)


def _changed_token_count(directory: RunDir, tokens_until: Callable[[int], int | None]) -> list[Change]:
    """For a run that has recorded no hash of its data: compare how many tokens it has read with how many the files give now."""
    every = reversed(select.checkpoints(directory.checkpoints))
    if not (saves := [path for path in every if not manifest.verify(path, only=("state/progress",))]):
        return []
    step = select.step_of(saves[0])
    recorded_count, now = state.load_progress(saves[0] / "state", step)["tokens"], tokens_until(step)
    why = "the tokenizer, the template, this version or a library turns the same files into other sequences"
    return [] if now in (None, recorded_count) else [Change(f"data.train (tokens until step {step})", recorded_count, now, why)]


def _changed_content(config: Config, before: ContentHashes | None, now: ContentHashes) -> list[Change]:
    if before is None:
        log.info(
            "an older version started this run and recorded no content hashes: only names are compared, from now on contents too"
        )
        return []
    template = config.model.chat_template
    names = {"model": config.model.name_or_path, "reference": config.reference.name_or_path, "peft": config.peft.init_from,
              "optim": config.optim["init_from"], "data.format": ", ".join(custom_formats(config.data).values()) or None,
              "model.chat_template": template if template is None or "{" not in template else "as given",
              **{f"{node}._target_": target for node, target in _targets(config).items()}}  # fmt: skip
    return compare(before, now, {key: name for key, name in names.items() if name is not None})


def recorded(directory: RunDir) -> ContentHashes | None:
    """Return the hashes that the newest start recorded; for a run older than such records those in its newest checkpoint."""
    if (recorded_hashes := run_config.recorded_content(directory.read_attempts(), str(directory.path))) is not None:
        return recorded_hashes
    for path in reversed(select.checkpoints(directory.checkpoints)):
        chain = lineage.read(path) if not manifest.verify(path, contents=False) else None
        if chain is not None:
            return ContentHashes.from_lineage(chain["runs"][-1])
    return None
