"""Rows with what a teacher says of their scored tokens: what is read of them, and what is refused with its row."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from halos.data.encoded import Encoded
from halos.data.formats import read_example
from halos.data.row import Row
from halos.data.teacher import likeliest
from halos.data.tokenize import Encoder, vocabulary_of
from halos.errors import UserError
from halos.examples import Demonstration, row_hash
from halos.models.locate import locate

ASKED = {"prompt": "What is 2 + 3?", "completion": "5"}
HALF = float(np.log(0.5))


@pytest.fixture(scope="module")
def encoder(cache: Path) -> Encoder:
    return Encoder(
        AutoTokenizer.from_pretrained(locate("tiny", None, cache)), max_length=256, truncation="truncate", temperature=1.0
    )


@pytest.fixture(scope="module")
def plain(encoder: Encoder) -> Encoded:
    return encoded(encoder, {})


def encoded(encoder: Encoder, columns: dict[str, Any]) -> Encoded:
    row = Row({**ASKED, **columns}, "rows.jsonl:7")
    (result,) = encoder.encode([(read_example(row, score="last"), row.where)])
    assert isinstance(result, Encoded)
    return result


def said(count: int) -> dict[str, Any]:
    return {"teacher_ids": [[3, 4]] * count, "teacher_logps": [[HALF, -2.0]] * count}


def test_ragged_lists_become_one_table_of_the_likeliest_ids(encoder: Encoder, plain: Encoded) -> None:
    count = int(plain.completions[0].scored.sum())
    columns = said(count)
    columns |= {"teacher_ids": [[3, 4, 9]] + [[6]] * (count - 1), "teacher_logps": [[-2.0, HALF, -3.0]] + [[-1]] * (count - 1)}
    columns |= {"teacher_token_logps": [-0.25] * count, "teacher_row": row_hash((plain.prompt, plain.completions[0])).hex()}
    table = encoded(encoder, columns).teacher_logps
    assert table is not None
    assert likeliest(table, 2)[:2].tolist() == [[-0.25, np.float32(HALF), -2.0, 4.0, 3.0], [-0.25, -1.0, -np.inf, 6.0, 0.0]]
    assert likeliest(table[:1], 4)[0].tolist() == [-0.25, np.float32(HALF), -2.0, -3.0, -np.inf, 4.0, 3.0, 9.0, 0.0]
    bare = encoded(encoder, said(count)).teacher_logps
    assert bare is not None
    assert np.isnan(bare[:, 0]).all(), "nothing is known of the row's own tokens"


def test_a_row_that_is_cut_keeps_what_is_said_of_its_first_tokens(encoder: Encoder, plain: Encoded) -> None:
    count = int(plain.completions[0].scored.sum())
    short = Encoder(encoder._tokenizer, max_length=len(plain.prompt) + 1, truncation="truncate")
    cut = encoded(short, said(count))
    assert cut.teacher_logps is not None
    assert (count > 1, cut.teacher_logps.shape) == (True, (1, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_logps": None}, "teacher_ids and teacher_logps belong together, and teacher_logps is missing"),
        ({"teacher_ids": "3 4"}, "teacher_ids is 3 4, not a list, of every scored token, of lists of numbers"),
        ({"teacher_logps": [-1.0]}, r"teacher_logps is \[-1.0\], not a list"),
        ({"teacher_ids": [[3, 4]]}, "teacher_ids has 1 lists, and teacher_logps"),
        ("short", r"teacher_ids has 1 lists, and \d+ tokens are scored by this tokenizer and chat template"),
        ({"teacher_ids": [[3]]}, "teacher_ids has 1 ids, and that of teacher_logps 2 log-probs"),
        ({"teacher_ids": [[]], "teacher_logps": [[]]}, "the list 1 of teacher_ids is empty"),
        ({"teacher_ids": [[3, 3]]}, "the list 1 of teacher_ids has an id twice"),
        ({"teacher_ids": [[3, -4]]}, "the list 1 of teacher_ids has -4, which is no token id"),
        ({"teacher_ids": [[3, 4.0]]}, "has 4.0, which is no token id"),
        ({"teacher_ids": [[3, 99999]]}, r"teacher_ids has the id 99999, and the tokenizer \d+ ids"),
        ({"teacher_logps": [[HALF, 0.1]]}, "teacher_logps has 0.1, which is no log-prob: a finite number of at most 0"),
        ({"teacher_logps": [[HALF, float("nan")]]}, "has nan, which is no log-prob"),
        ({"teacher_logps": [[-0.1, -0.1]]}, r"probabilities that sum to 1.81, more than 1"),
        ({"teacher_token_logps": [-1.0]}, r"teacher_token_logps is no list of a log-prob for each of the \d+ tokens"),
        ({"teacher_vocabulary": "ab12"}, "teacher_vocabulary is ab12, and the policy's tokenizer has"),
        ({"teacher_row": "ab12"}, "teacher_row is the hash of other tokens"),
        (
            {"teacher_temperature": 2.0},
            "teacher_temperature is 2, and train.temperature=1: the teacher's log-probs are of another",
        ),
        ({"teacher_temperature": 0}, "teacher_temperature is 0, not a number above 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_row(
    encoder: Encoder, plain: Encoded, change: dict[str, Any] | str, message: str
) -> None:
    count = int(plain.completions[0].scored.sum())
    columns = said(1) if change == "short" else said(count)
    whole = dict(change) if isinstance(change, dict) else {}
    for name, value in whole.items():
        one_list = isinstance(value, list) and len(value) == 1 and isinstance(value[0], list)
        columns[name] = value * count if one_list and "1 lists" not in message else value
    with pytest.raises(UserError, match=rf"^rows.jsonl:7: .*{message}"):
        encoded(encoder, columns)


def test_the_hash_of_its_tokenizer_is_accepted_and_turns_that_a_teacher_has_read_are_not_removed(encoder: Encoder) -> None:
    talk = [{"role": "user" if n % 2 == 0 else "assistant", "content": f"word {n}"} for n in range(9)]
    row = Row({"prompt": talk, "completion": "done"}, "rows.jsonl:1")
    example = read_example(row, score="last")
    (whole,) = encoder.encode([(example, row.where)])
    assert isinstance(whole, Encoded)
    count = int(whole.completions[0].scored.sum())
    columns = {**row.record, **said(count), "teacher_vocabulary": vocabulary_of(encoder._tokenizer)}
    with_teacher = read_example(row._replace(record=columns), score="last")
    assert isinstance(with_teacher, Demonstration)
    short = Encoder(encoder._tokenizer, max_length=len(whole.prompt) + 1, truncation="truncate")
    (plain, taught) = short.encode([(replace(with_teacher, teacher_logps=None), row.where), (with_teacher, row.where)])
    assert isinstance(plain, Encoded)
    assert isinstance(taught, Encoded)
    assert (plain.cut_turns, taught.cut_turns, len(taught.prompt)) == (True, False, len(whole.prompt))
    assert taught.teacher_logps is not None
