"""Keys of `checkpoint` that would never act in a run: it saves, evaluates or ends otherwise; and what acts by a constant."""

from __future__ import annotations

from collections.abc import Sequence

from halos.config.overrides import typed_keys
from halos.config.reference_checks import LossTraits
from halos.config.schema import Config


def complaint(config: Config, overrides: Sequence[str]) -> str | None:
    """Return a message about the first key that was typed and does not act; None where all do."""
    typed, train, checkpoint = typed_keys(overrides), config.train, config.checkpoint
    saves = checkpoint.get("every") is not None or checkpoint.get("pinned") or "every" not in checkpoint
    best = f"checkpoint.keep_best={checkpoint.get('keep_best')}"
    is_typed = bool(checkpoint.get("keep_best")) and "checkpoint.keep_best" in typed
    if is_typed and not saves:
        return (
            f"{best} chooses among checkpoints, and checkpoint.every is null: give it a number of steps, or leave keep_best out"
        )
    if is_typed and train.eval_every is None and config.resume is None:
        return (
            f"{best} chooses by evaluations, and train.eval_every is null, so that there is none between the first step and the"
            " last: give it a number of steps, or leave keep_best out"
        )
    return pinned_beyond(config, train.steps) if "train.steps" in typed and train.steps else None


def pinned_beyond(config: Config, total: int) -> str | None:
    """Return a message about pinned steps that a new run of `total` steps never reaches; None where there are none."""
    beyond = [step for step in config.checkpoint.get("pinned") or () if step > total]
    if not beyond or config.resume is not None:
        return None
    return (
        f"checkpoint.pinned has {', '.join(map(str, beyond))}, and the run ends at step {total}, so nothing would be saved there:"
        f" give steps up to {total}, or leave {'them' if len(beyond) > 1 else 'it'} out"
    )


def watches_rewards_of_data(config: Config, loss: LossTraits, sources: Sequence[str] = ()) -> str | None:
    """Return a message where something acts by the mean of the rewards in a file, which no training changes; `sources` are the
    names of those that are measured apart. A hook may measure rewards of its own."""
    metric, watched = config.objective.metric, watching(config)
    if watched is None or config.online is not None or config.resume is not None:
        return None
    if not loss.on_rollouts or metric not in ("reward", *(f"{source}/reward" for source in sources)):
        return None
    return (
        f"{watched} watches objective.metric={metric}, which with loss={loss.name} is the mean of the rewards in data.eval and"
        " never changes: add objective.metric=loss objective.mode=min, or leave it out"
    )


def watching(config: Config) -> str | None:
    """Return the key that acts by the objective, with its value; None where none does."""
    keys = {"train.early_stopping": config.train.early_stopping, "checkpoint.keep_best": config.checkpoint.get("keep_best")}
    return next((f"{key}={value}" for key, value in keys.items() if value), None)
