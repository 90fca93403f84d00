"""Keys of online runs that would not act: those of other engines, of an evaluation that is none, and in a live loop of rounds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import fields

from halos.config import defaults
from halos.config.overrides import typed_keys
from halos.config.renamed_keys import current_name
from halos.config.rollout_modules import engine_class
from halos.config.schema import Config, Online, Sampler
from halos.errors import UserError

READ_BY_ALL = ("name", "temperature", "top_p", "max_new_tokens", "batch_size")  # keys of online.sampler
# keys of online
OF_ROUNDS = ("prompts_per_round", "steps_per_round", "carry_optimizer", "keep_rounds", "kl_samples", "config_file",
             "num_processes")  # fmt: skip
OF_ANSWERS = ("eval_samples", "eval_temperature", "pass_reward")  # keys of online about answers to evaluation prompts


def complaint(config: Config, overrides: Sequence[str]) -> str | None:
    """Return a message about the first key that was typed and does not act; None where all do."""
    online = config.online
    assert online is not None
    typed, sampler = {current_name(key) for key in typed_keys(overrides)}, online.sampler
    if problem := _of_evaluation(config, online, typed):
        return problem
    if online.steps is not None and online.reference == "last" and config.resume is None:
        return (
            "online.reference=last: in a live loop (online.steps) that would be the policy that has sampled the batch, from which"
            " it has not moved when it begins to learn, so that the KL is 0: leave it out, for the first policy"
        )
    for name in OF_ROUNDS if online.steps is not None else ():
        value = getattr(online, name)
        if f"online.{name}" in typed and value is not None:
            return f"online.{name}={value} is of rounds, and has no effect in a live loop (online.steps): leave it out"
    if online.scorer.aggregation == "normalised" and online.samples_per_prompt == 1 and config.resume is None:
        return (
            "online.scorer.aggregation=normalised compares the samples of a prompt, and online.samples_per_prompt=1 gives one: 2"
            " or more, or aggregation=sum"
        )
    if online.steps is None and "online.keep_rollouts" in typed and config.resume is None:
        return "online.keep_rollouts is of live loops (online.steps), and rounds keep all their samples: leave it out"
    if online.steps is not None and "train.epochs" in typed and config.resume is None:
        return (
            "train.epochs has no effect in a live loop (online.steps), where online.epochs are the passes over a batch: give that"
        )
    if "online.steps_per_round" in typed and (sets := _sets_size(online, typed)):
        return f"online.steps_per_round has no effect with {sets}, which sets the size of a round: give one of them"
    for name in idle_sampler_keys(sampler):
        if f"online.sampler.{name}" in typed:
            takes = ", ".join(engine_class(sampler.name).takes)
            return (
                f"online.sampler.{name} has no effect with online.sampler.name={sampler.name}, which takes {takes}: leave it out"
            )
    return None


def refuse_idle_reference(config: Config, overrides: Sequence[str], *, is_read: bool) -> None:
    """Raises UserError where online.reference was typed for a loss that, with its hyperparameters, reads no reference."""
    online = config.online
    assert online is not None
    if "online.reference" in typed_keys(overrides) and not is_read and config.resume is None:
        raise UserError(
            f"online.reference={online.reference} has no effect: online.loss={online.loss} with these keys reads no reference:"
            " leave it out"
        )


def refuse_idle_rescoring(config: Config, overrides: Sequence[str], *, compares_all: bool) -> None:
    """Raises UserError where online.rescore was typed for a live loop whose trainer compares the log-probs of all samples."""
    online = config.online
    assert online is not None
    if "online.rescore" in typed_keys(overrides) and compares_all and online.rescore and config.resume is None:
        raise UserError(
            f"online.rescore={online.rescore} has no effect in a live loop of {online.loss}, which compares the log-probs of all"
            " samples: leave it out"
        )


def _of_evaluation(config: Config, online: Online, typed: Collection[str]) -> str | None:
    if online.eval_samples > 1 and online.eval_temperature == 0:
        return (
            f"online.eval_samples={online.eval_samples} with online.eval_temperature=0 is the same answer {online.eval_samples}"
            " times: give a temperature, such as 0.7"
        )
    for name in OF_ANSWERS if config.resume is None else ():
        if f"online.{name}" in typed and not (config.data.eval and online.eval_prompts):
            without = "online.eval_prompts=0" if config.data.eval else "data.eval=[]"
            return f"online.{name} is of answers to evaluation prompts, and there are none ({without}): leave it out"
    if "online.pass_reward" in typed and online.pass_reward is not None and config.resume is None:
        if online.scorer.pairwise:
            return "online.pass_reward is a reward, and a judge that compares (online.scorer.pairwise) gives none: leave it out"
        if online.eval_samples == 1:
            return "online.pass_reward is of pass@k, which takes several answers: give online.eval_samples too, or leave it out"
    return None


def _sets_size(online: Online, typed: set[str]) -> str | None:
    if online.prompts_per_round is not None:
        return f"online.prompts_per_round={online.prompts_per_round}"
    return "train.steps" if "train.steps" in typed else None


def without_length(sampler: Sampler, spelled: Callable[[str], str]) -> str | None:
    """Return a message where no number of tokens is given and the engine counts none; `spelled` gives a key as the user writes
    it."""
    if sampler.max_new_tokens is not None or engine_class(sampler.name).reads_tokens:
        return None
    key, name = spelled("max_new_tokens"), sampler.name
    return f"{key} null is as many tokens as a prompt leaves, and {name} reads no tokens: give a number"


def sampler_keys(sampler: Sampler) -> list[str]:
    """Return the keys that the sampler's engine reads."""
    return [*READ_BY_ALL, *engine_class(sampler.name).takes]


def idle_sampler_keys(sampler: Sampler) -> list[str]:
    """Return the keys that the sampler's engine does not read and whose value is neither the default nor empty."""
    default, read = defaults.section(Sampler), sampler_keys(sampler)
    unread = [each.name for each in fields(sampler) if each.name not in read]
    return [name for name in unread if getattr(sampler, name) not in (None, getattr(default, name))]
