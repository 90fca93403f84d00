"""GSM8K as published (arXiv:2110.14168): worked solutions, and right and wrong solutions of four models."""

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from halos.data.readers.json_rows import read_jsonl
from halos.data.row import Row
from halos.errors import UserError
from halos.examples import Demonstration, Example, Judgement, Scored, Stepwise

LABELLED = (Judgement, Scored, Stepwise)  # kinds that a label becomes: a reward of 1 or -1, or the label of one step
EVAL_FRACTION = 0.1  # of the problems, at the end of the file
_MARKS = re.compile(r"<<[^<>\n]*>>")  # the calculator's: 48/2 = <<48/2=24>>24
_ANSWER = re.compile(r"\nA: *(?=[^\n]*\s*$)")  # model solutions end `A: 24`, the published ones `#### 24`


def file_for(directory: Path, kind: type[Example]) -> Path:
    """Return the file of a kind: demonstrations are in train.jsonl, pairs and labels in model_solutions.jsonl."""
    path = directory / ("train.jsonl" if kind is Demonstration else "model_solutions.jsonl")
    if not path.is_file():
        raise UserError(f"{path}: not found; data.root must be the directory with GSM8K's train.jsonl and model_solutions.jsonl")
    return path


def normalise(solution: str) -> str:
    """Remove calculator marks, and put the answer on a last line `#### 24`."""
    return _ANSWER.sub("\n#### ", _MARKS.sub("", solution)).rstrip()


def rows(path: Path, kind: type[Example], split: str) -> Iterator[Row]:
    """Yield rows of the kind that the loss takes; the last tenth of the problems is `eval`, so no problem is in both splits."""
    if split not in ("train", "eval"):
        raise UserError(f"{path}: no split '{split}'; gsm8k has train and eval")
    problems = list(read_jsonl(path))
    num_train = len(problems) - round(len(problems) * EVAL_FRACTION)
    for problem in problems[:num_train] if split == "train" else problems[num_train:]:
        try:
            yield from (Row(record, problem.where) for record in _records(problem.record, kind))
        except KeyError as error:
            raise UserError(f"{problem.where}: no column {error}, which GSM8K's {path.name} has") from error


def _records(problem: dict[str, Any], kind: type[Example]) -> Iterator[dict[str, Any]]:
    prompt = problem["question"]
    if kind is Demonstration:
        yield {"prompt": prompt, "completion": normalise(problem["answer"])}
        return
    solutions = [value for value in problem.values() if isinstance(value, dict)]
    labelled = [(normalise(each["solution"]), bool(each["is_correct"])) for each in solutions]
    if kind in LABELLED:
        yield from ({"prompt": prompt, "completion": text, "label": right} for text, right in labelled)
        return
    right, wrong = ([text for text, correct in labelled if correct is wanted] for wanted in (True, False))
    yield from ({"prompt": prompt, "chosen": good, "rejected": bad} for good, bad in product(right, wrong))
