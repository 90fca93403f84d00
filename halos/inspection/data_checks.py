"""Checks of tokenised data: what makes a training run learn something else than was meant, in milliseconds for 200,000 rows."""

from collections.abc import Iterable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from halos.data import oddities
from halos.data.dataset import Counts, Dataset
from halos.data.row import EQUAL
from halos.inspection.findings import Check, Finding, Level, counted, first_places
from halos.reward_kind import RewardKind

Splits = Sequence[tuple[str, Dataset]]

FEW = 0.01  # of the rows: below it repetitions are worth a note, and no warning
FULL = 0.9  # of a batch of whole groups: below it a step has noticeably fewer completions than was asked for
CUSTOM = "or make the examples with a function of yours (data.format)"


def checks_of(
    train: Dataset,
    held_out: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reward: RewardKind | None,
    on_rollouts: bool,
    temperature: float = 1.0,
) -> tuple[Check, ...]:
    """Check the data of a run. `reward`: of a reward model, which scores no token by its log-prob. `on_rollouts`:
    the loss compares the rewards of completions of one prompt, which may be equal. `temperature`: of training."""
    splits = [("train", train)] + ([("eval", held_out)] if held_out is not None else [])
    checks = [
        Check("a prompt begins with at most one BOS", tuple(_double_bos(splits, tokenizer))),
        Check("prompts have words, and end with a turn to answer", tuple(_odd_prompts(splits))),
        Check("conversations end with the assistant", tuple(_unanswered(splits))),
        Check("rows are of one split", tuple(_mixed_splits(splits))),
        Check("completions of a pair differ", tuple(_equal_completions(splits))),
        Check("no example contradicts another", tuple(_contradictions(train))),
        Check("no example occurs twice", () if on_rollouts else tuple(_duplicates(train))),
        Check("labels or rewards differ", tuple(_equal_rewards(train))),
    ]
    if reward is RewardKind.OUTCOME:
        checks.append(Check("the padding token is no end token", tuple(_padding(tokenizer))))
    elif reward is None:
        checks += [Check("examples have scored tokens", tuple(_unscored(splits))),
                   Check("scored turns end in a scored end token", tuple(_without_end(splits)))]  # fmt: skip
    if on_rollouts:
        checks.append(Check("rows were sampled at train.temperature", tuple(_other_temperature(splits, temperature))))
    if held_out is not None:
        checks.append(Check("held-out rows are no training rows", tuple(_leaks(train, held_out))))
    return tuple(checks)


def of_groups(data: Dataset, largest: np.ndarray, mean: float, batch_size: int) -> Check:
    """Check that batches of whole groups are about full: they have `mean` rows, and the `largest` group these."""
    found = Finding(
        "warning", f"a step has {mean:.3g} completions on average, and train.batch_size={batch_size}: it takes whole groups, as"
        f" many as fit where all are as large as the largest, which has {len(largest)}", _rows(data, largest[:1]),
        "give groups of one size, and a train.batch_size that is a multiple of it",
    )  # fmt: skip
    return Check("groups of completions fill the batches", (found,) if mean < FULL * batch_size else ())


def of_frozen_tokens(splits: Splits, frozen: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Check:
    """Check that no scored token is among `frozen`: tokens that were added, whose rows of the output head are not trained."""
    return Check("scored tokens can be learned", tuple(_unlearnable(splits, frozen, tokenizer)) if frozen else ())


def _odd(splits: Splits, oddity: str) -> Iterable[tuple[str, int, tuple[str, ...]]]:
    """Yield the number of examples with an oddity, and its first places, for each split that has any."""
    for name, data in splits:
        if total := sum(counts.oddities.get(oddity, 0) for counts in data.report):
            yield name, total, _places(data.report, oddity, total)


def _places(report: Sequence[Counts], why: str, total: int) -> tuple[str, ...]:
    return first_places([place for counts in report for place in counts.places.get(why, ())], total)


def _rows(data: Dataset, rows: np.ndarray) -> tuple[str, ...]:
    """The first places of rows given by their numbers."""
    return first_places([data.place(int(row)) for row in rows[:12]], len(rows))


def _double_bos(splits: Splits, tokenizer: PreTrainedTokenizerBase) -> Iterable[Finding]:
    if (bos := tokenizer.bos_token_id) is None:
        return
    for name, data in splits:
        double = np.flatnonzero((data.prompt_starts(2) == bos).all(1))
        if len(double):
            every = len(double) == len(data)
            level: Level = "error" if every else "warning"
            remedy = (
                "the chat template writes it twice, or writes it and the rows hold it: model.chat_template"
                if every
                else f"the rows hold the text {tokenizer.bos_token}, which the chat template writes: remove it from them"
            )
            which = "every prompt begins" if every else f"{counted(len(double), 'prompt begins', 'prompts begin')}"
            yield Finding(level, f"data.{name}: {which} with two BOS tokens", _rows(data, double), remedy)


def _odd_prompts(splits: Splits) -> Iterable[Finding]:
    for name, total, places in _odd(splits, oddities.ENDS_WITH_ASSISTANT):
        text = f"data.{name}: {counted(total, 'prompt ends', 'prompts end')} with a turn of the assistant"
        yield Finding(
            "warning", text, places, "the completion would answer an answer: join the two, or end prompts with the user"
        )
    for name, total, places in _odd(splits, oddities.NO_WORDS):
        text = f"data.{name}: {counted(total, 'prompt has', 'prompts have')} no words"
        yield Finding("warning", text, places, f"remove such rows, {CUSTOM}")
    for name, data in splits:
        empty = np.flatnonzero(data.prompt_lengths == 0)
        if 0 < len(empty) < len(data):  # of all rows it is plain text
            text = f"data.{name}: {counted(len(empty), 'prompt has', 'prompts have')} no tokens, so that all of the row is scored"
            yield Finding("warning", text, _rows(data, empty), "give them a prompt, or remove them")


def _unanswered(splits: Splits) -> Iterable[Finding]:
    for name, total, places in _odd(splits, oddities.UNANSWERED):
        text = f"data.{name}: {counted(total, 'conversation ends', 'conversations end')} with turns that the assistant does not"
        yield Finding("note", f"{text} answer: nothing is learned from them, and they are left out", places)


def _mixed_splits(splits: Splits) -> Iterable[Finding]:
    for name, data in splits:
        for counts in data.report:
            if mixed := oddities.mixed_splits(counts):
                listed = ", ".join(f"{value} {count}" for value, count in mixed.items())
                column, _, meant = max(
                    mixed, key=lambda value: (_is_held_out(value) == (name == "eval"), mixed[value])
                ).partition("=")
                remedy = (
                    f"{{path: {counts.name}, split: {meant}}} takes one"
                    if column == "split"
                    else f"keep the rows that are meant, {CUSTOM}"
                )
                yield Finding("warning", f"data.{name}: {counts.name} mixes rows of several splits ({listed})", (), remedy)


def _is_held_out(split: str) -> bool:
    """Whether a split, `split=test`, is one that is not to be trained on."""
    return oddities.HELD_OUT.match(split.partition("=")[2]) is not None


def _equal_completions(splits: Splits) -> Iterable[Finding]:
    for name, total, places in _odd(splits, oddities.BLANKS_APART):
        text = f"data.{name}: {counted(total, 'pair differs', 'pairs differ')} in blanks alone"
        yield Finding("warning", text, places, f"remove them, {CUSTOM}")
    for name, data in splits:
        if total := sum(counts.dropped.get(EQUAL, 0) for counts in data.report):
            text = f"data.{name}: {counted(total, 'pair of equal completions was', 'pairs of equal completions were')} dropped"
            yield Finding("note", text, _places(data.report, EQUAL, total))


def _contradictions(data: Dataset) -> Iterable[Finding]:
    prompts, completions = data.keys()
    if completions.shape[1] == 2:
        pairs, mirrored = _mixed(prompts, *completions.T), _mixed(prompts, *completions.T[::-1])
        found = np.flatnonzero(np.isin(pairs, mirrored))
        what = counted(len(found), "pair prefers what another rejects", "pairs prefer what others reject")
    elif "desirable" in data.labels:
        examples = _mixed(prompts, *completions.T)
        good = data.labels["desirable"] > 0
        found = np.flatnonzero(np.isin(examples, np.intersect1d(examples[good], examples[~good])))
        what = counted(len(found), "example is", "examples are") + " labelled both desirable and undesirable"
    else:
        return
    if len(found):
        remedy = "their gradients cancel: keep one of them, or none"
        yield Finding("warning", f"data.train: {what}", _rows(data, found), remedy)


def _duplicates(data: Dataset) -> Iterable[Finding]:
    labels = [values.astype(np.float64).view(np.int64) for name, values in data.labels.items() if name != "margin"]
    prompts, completions = data.keys()
    _, first, times = np.unique(_mixed(prompts, *completions.T, *labels), return_index=True, return_counts=True)
    if extra := len(data) - len(first):
        repeated = np.sort(first[times > 1])
        usual = "desirable" in data.labels  # of pairs that share a completion
        level: Level = "warning" if extra > FEW * len(data) and not usual else "note"
        text = f"data.train: {counted(extra, 'example repeats', 'examples repeat')} another token for token"
        remedy = (
            "remove them, or draw more often what is meant to count more (epochs of a data entry)" if level == "warning" else ""
        )
        yield Finding(level, text, _rows(data, repeated), remedy)


def _equal_rewards(data: Dataset) -> Iterable[Finding]:
    rewards, labels = data.labels.get("reward"), data.labels.get("desirable")
    if rewards is not None and len(data) > 1 and (rewards == rewards[0]).all():
        text = f"data.train: all {len(data)} rewards are {rewards[0]:g}"
        yield Finding("warning", text, (), "no completion is better than another: is this the column that was meant?")
    if labels is not None and (labels == labels[0]).all():
        text = f"data.train: every example is {'desirable' if labels[0] else 'undesirable'}"
        yield Finding("warning", text, (), "the loss has nothing to contrast them with: is this the column that was meant?")


def _unscored(splits: Splits) -> Iterable[Finding]:
    for name, data in splits:
        empty = np.flatnonzero((data.scored == 0).any(1))
        masked = sum(counts.oddities.get(oddities.MASKED, 0) for counts in data.report)
        if len(empty) == len(data):
            yield Finding(
                "error", f"data.{name}: no token of any example is scored", _rows(data, empty), "nothing can be learned"
            )
        elif len(empty) > masked:
            text = f"data.{name}: {counted(len(empty), 'example has', 'examples have')} a completion without a scored token"
            yield Finding("warning", text, _rows(data, empty), "nothing is learned from it: remove such rows")


def _unlearnable(splits: Splits, frozen: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterable[Finding]:
    for name, data in splits:
        rows = [row for row, item in enumerate(data)
                if any(np.isin(each.ids[each.scored], frozen).any() for each in item.completions)]  # fmt: skip
        if rows:
            added = ", ".join(map(str, tokenizer.convert_ids_to_tokens(list(frozen))))
            text = f"data.{name}: {counted(len(rows), 'example has scored tokens', 'examples have scored tokens')} of"
            remedy = "'peft.modules_to_save=[embed_tokens,lm_head]' trains them (embed_in and embed_out for pythia)"
            yield Finding(
                "warning", f"{text} model.add_tokens ({added}), whose rows of the output head are frozen, so all stay equally"
                " likely", _rows(data, np.array(rows)), remedy,
            )  # fmt: skip


def _without_end(splits: Splits) -> Iterable[Finding]:
    remedy = "the model would not learn to stop there: model.chat_template must write an end token after each turn"
    for name, data in splits:
        for _, total, places in _odd([(name, data)], oddities.NO_END):
            every = total == len(data)
            text = "every example is" if every else counted(total, "example is", "examples are")
            yield Finding("error" if every else "warning", f"data.{name}: {text} without a scored end token", places, remedy)
    for name, total, places in _odd(splits, oddities.NO_EARLIER_END):
        text = f"data.{name}: {counted(total, 'example has', 'examples have')} an earlier scored turn without a scored end token"
        yield Finding("warning", text, places, remedy)
    for name, total, places in _odd(splits, oddities.SAMPLED_WITHOUT_END):
        text = f"data.{name}: {counted(total, 'example was', 'examples were')} {oddities.SAMPLED_WITHOUT_END}"
        yield Finding("warning", text, places, "keep the end token in output_ids where it was sampled")


def _other_temperature(splits: Splits, own: float) -> Iterable[Finding]:
    """Yield rows whose log-probs are of another softmax than training's: their weights against the sampler are between two."""
    for name, data in splits:
        others = {
            each: sum(counts.temperatures.get(each, 0) for counts in data.report)
            for each in dict.fromkeys(each for counts in data.report for each in counts.temperatures)
            if each != f"{own:g}"
        }
        for other, total in others.items():
            greedy = " (greedily, with log-probs at 1)" if other == "0" else ""
            text = f"data.{name}: {counted(total, 'row was', 'rows were')} sampled at temperature {other}{greedy}, and"
            text += f" train.temperature={own:g}"
            theirs = "" if greedy else f" train.temperature={other} makes the two equal, or"
            remedy = f"mismatch/* and train.correction weigh the two against each other:{theirs} sample at {own:g}"
            yield Finding("warning", text, _places(data.report, oddities.sampled_at(other), total), remedy)


def _padding(tokenizer: PreTrainedTokenizerBase) -> Iterable[Finding]:
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        text = (
            f"the padding token is the end token {tokenizer.eos_token}: scores are read at the token before it, as transformers'"
        )
        yield Finding("note", f"{text} classifiers do")


def _leaks(train: Dataset, held_out: Dataset) -> Iterable[Finding]:
    (prompts, completions), (held_prompts, held_completions) = train.keys(), held_out.keys()
    asked = np.isin(held_prompts, prompts)
    same = np.flatnonzero(asked & np.isin(_mixed(held_prompts, *held_completions.T), _mixed(prompts, *completions.T)))
    if len(same):
        text = f"{len(same)} of {len(held_out)} rows of data.eval are rows of data.train too"
        remedy = "what is measured on them is memory: hold other rows out"
        yield Finding("warning", text, _rows(held_out, same), remedy)
    elif asked.any():
        text = f"{int(asked.sum())} of {len(held_out)} prompts of data.eval are prompts of data.train, with other completions"
        yield Finding("note", text, _rows(held_out, np.flatnonzero(asked)))


def _mixed(*keys: np.ndarray) -> np.ndarray:
    """One key for each row of several, which depends on their order: (N,)."""
    mixed = np.zeros(len(keys[0]), np.uint64)
    for key in keys:
        mixed = (mixed ^ key.view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
    return mixed
