"""Rows of known lengths, and the FLOPs that they need."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hot_path_data import WORDS, choose
from hot_path_workloads import Dimensions, Rows, written
from transformers import AutoTokenizer

from gpu.place import Place

LONGEST = 1024  # tokens of prompt and completion
ANSWERS = 200  # words of a longer completion in the middle


def make(workload: str, model: str, place: Place, *, steps: int, batch_size: int, answers: bool = False) -> Rows:
    """The rows of a workload of hot_path_workloads for so many steps: with the lengths of dialogues, or of longer `answers`."""
    directory = place.model(model)
    tokenizer, size = AutoTokenizer.from_pretrained(directory), Dimensions.of(str(directory))
    words = ANSWERS if answers else WORDS
    pairs, _ = choose(None, tokenizer, count=steps * batch_size, limit=LONGEST, seed=0, words=words)
    given: Any = SimpleNamespace(steps=steps, max_length=LONGEST)
    work = Path(place.work) / "rows" / f"{workload}-{model}-{steps}x{batch_size}-{words}"
    work.mkdir(parents=True, exist_ok=True)
    return written(workload, pairs, tokenizer, size, given, work)
