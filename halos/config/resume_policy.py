"""Decide which keys a resume may change, and which changes would silently alter what the run computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halos.config import renamed_keys
from halos.config.bind_optim import bind_schedule
from halos.config.paths import BUNDLED_MODELS, absolute
from halos.config.rollout_modules import scorer_class
from halos.config.schema import CONTENT, MICROBATCH, OBJECTIVE, SAFE, SCORER, STEPS, Config, Scope, key_facts
from halos.config.values import as_argument, show
from halos.confined import UnreadableError, load_json
from halos.errors import UserError


@dataclass(frozen=True, slots=True)
class PreviousRun:
    """The state of a run before it is resumed, as far as it decides which changes are safe."""

    settings: Mapping[str, Any]  # its last configuration
    path: Path
    newest: int | None  # step of the requested checkpoint, else of its newest; None where it has none
    by_content: bool = False  # it recorded hashes of its inputs; else only their names can be compared
    total: int | None = None  # its number of steps, as its last attempt recorded it; None in runs of older versions


Condition = Callable[[Config, PreviousRun], str | None]  # why the change would alter what is computed; None: it would not


@dataclass(frozen=True, slots=True)
class Change:
    """A key whose value has changed. `why` says how that alters the mathematics; None: it does not."""

    key: str
    old: Any
    new: Any
    why: str | None

    def __str__(self) -> str:
        return f"{self.key} {show(self.old)} -> {show(self.new)}"

    @property
    def explained(self) -> str:
        return f"{self} ({self.why})" if self.why else str(self)


def _num_steps(config: Config, past: PreviousRun) -> str | None:
    if past.newest is None:
        return None  # no step to keep
    train, now = past.settings["train"], config.train.steps
    before, epochs, old = train.get("steps") or past.total, config.train.epochs, train.get("epochs")
    if now is None and past.total and not train.get("steps") and epochs and old:
        likely = int(past.total * epochs / old)  # the data, which tell exactly, have not been read yet
        return why_not(config, past.newest, before, [max(1, likely + near) for near in (-1, 0, 1, 2)])
    return why_not(config, past.newest, before, [now] if now else None)


def longer_than(steps: int) -> list[int]:
    """Two totals of longer runs, to try what holds for all."""
    return [2 * (steps + 1000), 20 * (steps + 1000)]


def why_not(config: Config, taken: int, before: int | None, after: Sequence[int] | None = None) -> str | None:
    """Return why a run that has taken so many steps, of `before` in total, would not end as a run of each of the totals `after`
    does: the learning rates of the steps taken depend on the total. None: they do not. For unknown totals some are tried."""
    unknown = [taken, *longer_than(taken)]
    totals = [*([before] if before else unknown), *(after or unknown)]
    schedule = bind_schedule(config.schedule, config.plugins)
    if schedule.same_before(taken, totals):
        return None
    if "warmup" in config.schedule:
        without = bind_schedule({**config.schedule, "warmup": 0}, config.plugins)
        if without.same_before(taken, totals):
            return f"its warm-up is a fraction of all steps (schedule.warmup={config.schedule['warmup']})"
    return f"the {schedule.name} schedule is spread over all steps"


def _microbatch(config: Config, past: PreviousRun) -> str | None:
    if config.peft.name == "lora" and config.peft.lora_dropout:
        return f"with peft.lora_dropout={config.peft.lora_dropout} it decides which elements are dropped"
    name = config.model.name_or_path
    if name in BUNDLED_MODELS:
        return None
    models = [*past.path.glob("checkpoints/step-*/model"), past.path / "FINAL", Path(name or "")]
    config_json = next((model / "config.json" for model in models if (model / "config.json").is_file()), None) or _cached(config)
    if config_json is None:
        return "whether its model has dropout is unknown before it loads"
    try:
        drawn = drawn_in(load_json(config_json))
    except UnreadableError as error:
        return f"whether its model has dropout is unknown: {error}"
    effect = "which elements are dropped" if drawn and "drop" in drawn else "the noise"
    return f"with the model's {drawn} it decides {effect}" if drawn else None


def _cached(config: Config) -> Path | None:
    """Return the path of a hub model's config.json in the local cache; None where it was never downloaded."""
    from huggingface_hub import try_to_load_from_cache  # here: most commands do not need it
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(config.model.name_or_path or "", "config.json", revision=config.model.revision)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None


def drawn_in(node: Any) -> str | None:
    """Return the first non-zero dropout or noise of a model's config.json, such as `resid_pdrop=0.1`."""
    for name, value in node.items() if isinstance(node, dict) else ():
        if (
            any(word in str(name) for word in ("drop", "jitter"))
            and isinstance(value, int | float)
            and not isinstance(value, bool)
            and value > 0
        ):
            return f"{name}={value}"
        if inner := drawn_in(value):
            return inner
    return None


def _early_stopping(config: Config, past: PreviousRun) -> str | None:
    return "early stopping remembers the best value of the other objective" if config.train.early_stopping is not None else None


def _scorer(config: Config, past: PreviousRun) -> str | None:
    """A model that this machine reads is compared by its content; of one behind an API only the name is known."""
    by_content = past.by_content and config.online is not None and "model" in scorer_class(config.online.scorer.name).paths
    return None if by_content else ""


CONDITIONS: dict[str, Condition] = {STEPS: _num_steps, MICROBATCH: _microbatch, OBJECTIVE: _early_stopping, SCORER: _scorer}
NOT_COMPARED = (Scope.PLACE, Scope.COMMAND, Scope.CODE, Scope.RECORD)
COMPOSED = ("online.loss", "online.overrides")  # keys that compose the training inside an online run, once
TARGETED = ("loss", "optim", "schedule", "trainer", "checkpoint")  # nodes whose keys are the parameters of their _target_
LENGTH = ("train.steps", "train.epochs", "train.early_stopping")  # keys with which a finished run may go on
ON_RESUME: dict[str, str] = {key: facts["on_resume"] for key, facts in key_facts() if facts["scope"] not in NOT_COMPARED}


def compare(config: Config, past: PreviousRun) -> list[Change]:
    """Return every key in which `config` differs from the run's last configuration."""
    changes, settings = [], asdict(config)
    for key, verdict in ON_RESUME.items():
        values = value_at(past.settings, key), value_at(settings, key)
        for name, old, new in differences(key, *(map(absolute, values) if verdict == CONTENT else values)):
            by_content = verdict == CONTENT and past.by_content
            # a key that was added after the run began had no value in it
            safe = verdict == SAFE or by_content or not has_key(past.settings, key)
            why = None if safe else CONDITIONS[verdict](config, past) if verdict in CONDITIONS else ""
            changes.append(Change(name, old, new, why))
    return changes


def refuse_unsafe(changes: Sequence[Change], path: Path) -> None:
    """Raises UserError, naming all of them at once, where changes would alter what a run computes."""
    unsafe = [change.explained for change in changes if change.why is not None]
    if unsafe:
        raise UserError(
            f"{path} would no longer compute what it began: {'; '.join(unsafe)}. Leave that out, or restore it; or add"
            " resume_changes=allow, which resumes with the change and records it; or start a new run from its trained model,"
            " without resume="
        )


def refuse_impossible(changes: Sequence[Change], past: PreviousRun) -> None:
    """Raises UserError, whatever resume_changes says, where a checkpoint of the run holds other weights than would be trained,
    and for keys that only a start reads."""
    change = next((change for change in changes if change.key == "peft.name"), None)
    if change is not None and past.newest is not None:
        held = "an adapter and no whole model" if change.old == "lora" else "a whole model and no adapter"
        raise UserError(
            f"{change}: the checkpoints of {past.path} hold {held}, so this run cannot go on with that. Leave it out; or start a"
            " new run, without resume=, from the model that this one has trained (FINAL, or what"
            f" python -m halos.checkpoint export {past.path} writes)"
        )
    if (change := next((change for change in changes if change.key in COMPOSED), None)) is not None:
        raise UserError(
            f"{change}: {past.path} keeps the loss and the overrides that its training was composed of when it began. Leave that"
            " out, and give a key of train, optim or checkpoint by itself; or start a new run, without resume=, from the model"
            f" that this one has trained ({as_argument('model.name_or_path', past.path / 'FINAL')})"
        )


def apply_changes(settings: dict[str, Any], changed: Mapping[str, Sequence[Any]]) -> None:
    """Apply the changes that an earlier attempt recorded, {key: [old, new]}, to a saved configuration, in place."""
    for key, (_, new) in changed.items():
        *parents, name = key.split(".")
        node = settings
        for parent in parents:
            node = node[parent]
        node[name] = new
    if isinstance(settings.get("hooks"), Mapping):  # else the configuration is truncated, which its validation reports
        settings["hooks"] = {name: hook for name, hook in settings["hooks"].items() if hook is not None}


def has_key(settings: Mapping[str, Any], key: str) -> bool:
    """Return whether a dotted key exists, with any value including null, also under its old name."""
    section, _, name = key.rpartition(".")
    node = value_at(settings, section) if section else settings
    return isinstance(node, Mapping) and name in node


def value_at(node: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key or at its old name; None where neither exists."""
    value: Any = node
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    old = renamed_keys.old_name(key)
    return value if value is not None or old is None else value_at(node, old)


def differences(key: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Return (key, old, new) for what differs at a key. A node with a `_target_` is compared key by key where both have the same
    keys, else as a whole; `hooks` hook by hook. Keys with an entry of their own in the schema are compared there."""
    if key not in TARGETED and key != "hooks":
        return [] if _same(old, new) else [(key, old, new)]

    def own(node: Any) -> dict[str, Any]:
        return {name: value for name, value in (node or {}).items() if f"{key}.{name}" not in ON_RESUME}

    one, other = own(old), own(new)
    if _same(one, other):
        return []
    if key != "hooks" and one.keys() != other.keys():
        return [(key, old, new)]
    names = list(dict.fromkeys([*one, *other]))
    pairs = [(f"{key}.{name}", one.get(name), other.get(name)) for name in names]
    return [(name, was, now) for name, was, now in pairs if not _same(was, now)]


def _same(one: Any, other: Any) -> bool:
    """Compare two values, numbers by value however they are written: YAML reads 1e-5 as text."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, bool) or isinstance(other, bool) or isinstance(one, str) == isinstance(other, str):
        return one == other and isinstance(one, bool) == isinstance(other, bool)
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return False
