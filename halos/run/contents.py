"""What a run stands on, hashed at its start, and compared with what it stood on before."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from halos import confined
from halos.checkpoint import lineage, manifest, select, state
from halos.config import arithmetic_version, resume_policy, run_config
from halos.config.arithmetic_version import RunFacts
from halos.config.content_hashes import ContentHashes, compare
from halos.config.custom_formats import custom_formats
from halos.config.plugins import code_hash
from halos.config.resume_policy import Change
from halos.config.schema import Config
from halos.data.sources import content_hash
from halos.hashes import file_hash
from halos.models.locate import locate
from halos.rollout.scorers.functions import parts_of
from halos.rundir import RunDir

log = logging.getLogger(__name__)

UNREAD = ("transformers_version", "_name_or_path")  # of a config.json: nothing is computed from them


def read(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, str | None],
    *,
    base: Path,
    reference: Path | None,
) -> ContentHashes:
    """`rows` are the hashes of the data as it is trained on; `base` and `reference` the directories of their weights."""
    cache = Path(config.cache_dir)
    hashes: dict[str, str | None] = {
        arithmetic_version.KEY: str(arithmetic_version.VERSION),
        **rows,
        "model.chat_template": _of(tokenizer.chat_template),
        "model.tokenizer": _tokenizer(base, tokenizer, cache),
        **_model("model", base, cache),
        **_model("reference", reference, cache),
        "peft.init_from": None,
        **{f"{node}._target_": code_hash(getattr(config, node)["_target_"]) for node in ("loss", "optim", "schedule")},
        **_scorer(config, cache),
        "data.format": _formats(config),
    }
    if config.peft.name == "lora" and config.peft.init_from is not None:
        hashes["peft.init_from"] = lineage.identity(Path(config.peft.init_from), cache)
    if config.optim["init_from"] is not None:
        optimizer = Path(config.optim["init_from"]) / "state" / "optimizer"
        gone = config.resume and not optimizer.is_dir()  # what has gone on from checkpoints of its own no longer reads it
        hashes |= {} if gone else {"optim.init_from": lineage.identity(optimizer, cache)}
    return ContentHashes(hashes, {purpose: [_source(entry, purpose) for entry in entries]
                            for purpose, entries in (("train", config.data.train), ("eval", config.data.eval))})  # fmt: skip


def _of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _tokenizer(base: Path, tokenizer: PreTrainedTokenizerBase, cache: Path) -> str:
    """By its files and what became of them, not by what a library's version writes of it."""
    file = base / "tokenizer.json"
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _of([file_hash(file, cache) if file.is_file() else None, sorted(tokenizer.get_vocab().items()), special])


def _formats(config: Config) -> str | None:
    """Of the functions of the user's own that make examples of rows."""
    codes = {target: code_hash(target) for target in custom_formats(config.data).values()}
    return _of(codes) if codes else None


def _model(name: str, directory: Path | None, cache: Path) -> dict[str, str | None]:
    found: dict[str, str | None] = {f"{name}.weights": None if directory is None else lineage.identity(directory, cache)}
    for file in ("config.json", "generation_config.json"):
        path = directory / file if directory is not None else None
        facts = confined.load_object(path) if path is not None and path.is_file() else None
        known = None if facts is None else {key: value for key, value in facts.items() if key not in UNREAD}
        found[f"{name}.{file}"] = None if known is None else _of(known)
    return found


def _scorer(config: Config, cache: Path) -> dict[str, str | None]:
    """What scores a live loop's samples."""
    keys = ("online.scorer.model", "online.scorer.rubric", "online.scorer.functions")
    found: dict[str, str | None] = dict.fromkeys(keys)
    scorer = config.online.scorer if config.online is not None else None
    if scorer is not None and scorer.name == "function":
        codes = {part.path: code_hash(part.path) for part in parts_of(scorer.functions, config.plugins)}
        found["online.scorer.functions"] = _of(codes) if any(codes.values()) else None
    if scorer is not None and scorer.name == "reward_model" and scorer.model is not None:
        found["online.scorer.model"] = lineage.identity(locate(scorer.model, None, cache), cache)
    if scorer is not None and scorer.rubric is not None:
        found["online.scorer.rubric"] = file_hash(Path(scorer.rubric))
    return found


def _source(entry: Any, purpose: str) -> dict[str, Any]:
    source = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
    return {**{key: value for key, value in source.items() if value is not None}, "hash": content_hash(entry, purpose)}


def changed(
    config: Config, computed: RunFacts, now: ContentHashes, tokens_until: Callable[[int], int | None] = lambda step: None
) -> list[Change]:
    """What has become another thing since the run last started, the arithmetic of its steps included. Raises UserError unless
    resume_changes=allow. `tokens_until` a step are those of its rows as they are read now."""
    directory = RunDir(config.run_dir)
    before = recorded(directory)
    since = _computed_with(directory, before)
    found = [*_other_content(config, before, now), *arithmetic_version.changes_since(since, computed)]
    if before is None or "data.train" not in before.hashes:
        found += _other_rows(directory, tokens_until)
    if config.resume_changes == "refuse":
        resume_policy.refuse_unsafe(found, directory.path)
    for line in arithmetic_version.notes_since(since, computed):
        log.info("other than where the run began: %s", line)
    return found


def _computed_with(directory: RunDir, before: ContentHashes | None) -> int:
    """The number of the arithmetic of a run, by its newest start, else by its newest save."""
    if before is not None and arithmetic_version.KEY in before.hashes:
        return arithmetic_version.recorded_version(before.hashes)
    saves = (manifest.read(path) for path in reversed(select.checkpoints(directory.checkpoints)))
    return next((arithmetic_version.recorded_version(listing) for listing in saves if isinstance(listing, dict)), 0)


def _other_rows(directory: RunDir, tokens_until: Callable[[int], int | None]) -> list[Change]:
    """Of a run that has no hash of its rows on record: whether as many tokens were read as the same files give now."""
    every = reversed(select.checkpoints(directory.checkpoints))
    if not (saves := [path for path in every if not manifest.verify(path, only=("state/progress",))]):
        return []
    step = select.step_of(saves[0])
    known, now = state.load_progress(saves[0] / "state", step)["tokens"], tokens_until(step)
    why = "the tokenizer, the template, this version or a library makes other rows of its files"
    return [] if now in (None, known) else [Change(f"data.train (tokens until step {step})", known, now, why)]


def _other_content(config: Config, before: ContentHashes | None, now: ContentHashes) -> list[Change]:
    if before is None:
        log.info("an older version began this run and recorded no contents: only names are compared, from now on contents too")
        return []
    template = config.model.chat_template
    places = {"model": config.model.name_or_path, "reference": config.reference.name_or_path, "peft": config.peft.init_from,
              "optim": config.optim["init_from"], "data.format": ", ".join(custom_formats(config.data).values()) or None,
              "model.chat_template": template if template is None or "{" not in template else "as typed",
              **{f"{node}._target_": getattr(config, node)["_target_"] for node in ("loss", "optim", "schedule")}}  # fmt: skip
    return compare(before, now, {key: place for key, place in places.items() if place is not None})


def recorded(directory: RunDir) -> ContentHashes | None:
    """What its newest start recorded; of a run that is older than such records what is sealed in its newest checkpoint."""
    if (known := run_config.recorded_content(directory.read_attempts(), str(directory.path))) is not None:
        return known
    for path in reversed(select.checkpoints(directory.checkpoints)):
        chain = lineage.read(path) if not manifest.verify(path, contents=False) else None
        if chain is not None:
            return ContentHashes.from_lineage(chain["runs"][-1])
    return None
