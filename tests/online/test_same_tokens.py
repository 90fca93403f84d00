"""Rounds learn from the tokens that were sampled, as live loops do: what a stage writes is what the training reads."""

from pathlib import Path

import pytest

from halos.config.defaults import section
from halos.config.schema import Feedback
from halos.data.dataset import open_dataset
from halos.data.prepare import prepare
from halos.data.tokenize import Encoder, vocabulary_of
from halos.online.live import _item
from halos.online.records import write
from halos.rollout import feedback
from halos.rollout.types import Prompt, Rollout, Sample, Score
from tests.data.tokenizers import tokenizer, user

SAID = ("It is 42.", "It is 4", "no", "It is twelve and")  # of which the second and the last were cut


@pytest.mark.parametrize("kind", [feedback.PAIRWISE, feedback.BINARY, feedback.SCALAR])
def test_training_in_rounds_reads_the_tokens_of_a_live_loop_for_the_same_samples(kind: str, tmp_path: Path) -> None:
    made = tokenizer()
    turns = (user("What is 12 + 30?"),)
    (ids,) = Encoder(made, max_length=1000, truncation="drop").prompts([(turns, "here")])
    end, sampled = made.convert_tokens_to_ids("<|im_end|>"), {}
    for number, text in enumerate(SAID):  # letter by letter, as no tokenizer would
        letters = [token for letter in text for token in made(letter, add_special_tokens=False)["input_ids"]]
        sampled[number] = (*letters, end) if number % 2 == 0 else tuple(letters)
    prompt = Prompt("p", turns, "train", ids=ids)
    rollouts = [Rollout(Sample(prompt, number, text, "length" if number % 2 else "stop", ids=sampled[number],
                               logps=(-1.0,) * len(sampled[number]), vocabulary=vocabulary_of(made)), Score(float(number)))
                for number, text in enumerate(SAID)]  # fmt: skip
    result, _ = feedback.make(rollouts, section(Feedback, pairing="random"), kind=kind, seed=0)
    write(tmp_path / "feedback.jsonl", [each.to_row() for each in result])
    rows = open_dataset(prepare([str(tmp_path / "feedback.jsonl")], kind=feedback.EXAMPLES[kind], tokenizer=made,
                                max_length=1000, truncation="drop", score="last", cache_dir=tmp_path))  # fmt: skip
    trained, live = list(rows), [_item(each, "live") for each in result]
    assert len(trained) == len(live) == (2 if kind == feedback.PAIRWISE else 4)
    for one, other in zip(trained, live, strict=True):
        assert one.prompt.tolist() == other.prompt.tolist() == ids.tolist()
        assert one.labels == other.labels
        assert [each.ids.tolist() for each in one.completions] == [each.ids.tolist() for each in other.completions]
        assert all(each.scored.all() for each in (*one.completions, *other.completions))
    learned = {tuple(each.ids.tolist()) for item in trained for each in item.completions}
    assert learned == set(sampled.values()), "the cut ones end as they were cut"
