"""What may be typed anew when a run is resumed, and what would silently change what it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halos.config import renamed_keys
from halos.config.bind_optim import ScheduleSpec, bind_schedule
from halos.config.paths import BUNDLED_MODELS, absolute
from halos.config.schema import CONTENT, MICROBATCH, OBJECTIVE, SAFE, SCORER, STEPS, Config, Scope, key_facts
from halos.config.values import show
from halos.confined import UnreadableError, load_json
from halos.errors import UserError


@dataclass(frozen=True, slots=True)
class PreviousRun:
    """What a run has behind it, as far as it decides which changes are safe."""

    settings: Mapping[str, Any]  # as it was last configured
    path: Path
    oldest: int | None  # step of its oldest checkpoint, below which it can only start over
    by_content: bool = False  # whether it has recorded what it stands on; else all that can be compared are names


Condition = Callable[[Config, PreviousRun], str | None]  # why the change would alter what is computed; None where it would not


@dataclass(frozen=True, slots=True)
class Change:
    """One key that is no longer what it was. `why` says what it does to the mathematics; None: nothing."""

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
    """More or fewer steps are free where the rate of every step to come is what it would have been: asked of the schedule."""
    if past.oldest is None:
        return None  # no step has been made
    before, now = past.settings["train"].get("steps"), config.train.steps

    def is_free(schedule: ScheduleSpec) -> bool:
        start = past.oldest or 0
        return schedule.agrees(before, now, start=start) if before and now else not schedule.is_spread(start)

    schedule = bind_schedule(config.schedule, config.plugins)
    if is_free(schedule):
        return None
    if "warmup" in config.schedule and is_free(bind_schedule({**config.schedule, "warmup": 0}, config.plugins)):
        return f"its warm-up is a share of all steps (schedule.warmup={config.schedule['warmup']})"
    return f"the {schedule.name} schedule is spread over all steps"


def _microbatch(config: Config, past: PreviousRun) -> str | None:
    if config.peft.name == "lora" and config.peft.lora_dropout:
        return f"with peft.lora_dropout={config.peft.lora_dropout} it decides what is dropped"
    name = config.model.name_or_path
    if name in BUNDLED_MODELS:
        return None
    places = [*past.path.glob("checkpoints/step-*/model"), past.path / "FINAL", Path(name or "")]
    found = next((place / "config.json" for place in places if (place / "config.json").is_file()), None) or _cached(config)
    if found is None:
        return "whether its model has dropout cannot be told before it loads"
    try:
        dropout = _dropout(load_json(found))
    except UnreadableError as error:
        return f"whether its model has dropout cannot be told: {error}"
    return f"with the model's {dropout} it decides what is dropped" if dropout else None


def _cached(config: Config) -> Path | None:
    """A hub model's config.json, where it was downloaded before."""
    from huggingface_hub import try_to_load_from_cache  # here: most commands do without
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(config.model.name_or_path or "", "config.json", revision=config.model.revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _dropout(node: Any) -> str | None:
    """The first dropout of a model's configuration that is not zero, `resid_pdrop=0.1`."""
    for name, value in node.items() if isinstance(node, dict) else ():
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return f"{name}={value}"
        if inner := _dropout(value):
            return inner
    return None


def _early_stopping(config: Config, past: PreviousRun) -> str | None:
    return "early stopping remembers the best of the other objective" if config.train.early_stopping is not None else None


def _scorer(config: Config, past: PreviousRun) -> str | None:
    """A reward model is compared by its content; a judge has but a name."""
    return None if past.by_content and config.online is not None and config.online.scorer.name == "reward_model" else ""


CONDITIONS: dict[str, Condition] = {STEPS: _num_steps, MICROBATCH: _microbatch, OBJECTIVE: _early_stopping, SCORER: _scorer}
NOT_COMPARED = (Scope.PLACE, Scope.COMMAND, Scope.CODE)
TARGETED = ("loss", "optim", "schedule", "checkpoint")  # nodes whose keys are those of what their _target_ names
ON_RESUME: dict[str, str] = {key: facts["on_resume"] for key, facts in key_facts() if facts["scope"] not in NOT_COMPARED}


def compare(config: Config, past: PreviousRun) -> list[Change]:
    """Every key in which `config` is not what the run was last configured with."""
    changes = []
    for key, verdict in ON_RESUME.items():
        values = value_at(past.settings, key), value_at(asdict(config), key)
        for name, old, new in differences(key, *(map(absolute, values) if verdict == CONTENT else values)):
            by_content = verdict == CONTENT and past.by_content
            # a key that is younger than the run had no value in it
            safe = verdict == SAFE or by_content or not has_key(past.settings, key)
            why = None if safe else CONDITIONS[verdict](config, past) if verdict in CONDITIONS else ""
            changes.append(Change(name, old, new, why))
    return changes


def refuse_unsafe(changes: Sequence[Change], path: Path) -> None:
    """Raises UserError, with all of them in one message, where changes would silently alter what a run computes."""
    told = [change.explained for change in changes if change.why is not None]
    if told:
        raise UserError(
            f"{path} would no longer compute what it began: {'; '.join(told)}. Leave that out, or put it back; or add"
            " resume_changes=allow, and it goes on changed, on record; or begin a new run from what it has trained, without"
            " resume="
        )


def apply_changes(settings: dict[str, Any], changed: Mapping[str, Sequence[Any]]) -> None:
    """Put what an earlier attempt changed, {key: [old, new]}, into a saved configuration."""
    for key, (_, new) in changed.items():
        *parents, name = key.split(".")
        node = settings
        for parent in parents:
            node = node[parent]
        node[name] = new
    if isinstance(settings.get("hooks"), Mapping):  # else the configuration is cut short, which is told where it is checked
        settings["hooks"] = {name: hook for name, hook in settings["hooks"].items() if hook is not None}


def has_key(settings: Mapping[str, Any], key: str) -> bool:
    """Whether a dotted key is there, be it with null, or under an old name."""
    section, _, name = key.rpartition(".")
    node = value_at(settings, section) if section else settings
    return isinstance(node, Mapping) and name in node


def value_at(node: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, which may stand there under an old name; None where there is nothing."""
    found: Any = node
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    old = renamed_keys.old_name(key)
    return found if found is not None or old is None else value_at(node, old)


def differences(key: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """What changed at a key: of a node with a target each of its keys while the keys are the same, of hooks each hook. Keys that
    have an entry of their own in the schema are compared by themselves."""
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
    """Equal, whichever way a number is written: YAML reads 1e-5 as text."""
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
