"""Lines of the header that say what a user would not guess from the counts."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from halos.data.dataset import Counts
from halos.data.encoded import PROMPT_TOO_LONG, TOO_LONG
from halos.run import header


class Rows:
    def __init__(self, kept: int, dropped: dict[str, int]) -> None:
        self.kept, self.report = kept, (Counts("a.jsonl", rows=100, kept=kept, dropped=dropped),)

    def __len__(self) -> int:
        return self.kept


@pytest.mark.parametrize(
    ("kept", "dropped", "most", "said"),
    [
        (60, {TOO_LONG: 30, PROMPT_TOO_LONG: 10}, 512, "40% of the examples (train) are longer than train.max_length=512 and left"
         " out: raise it, or train.truncation=truncate"),
        (60, {TOO_LONG: 40}, 128, "40% of the examples (train) are longer than the model's positions=128 and left out:"
         " train.truncation=truncate"),
        (95, {TOO_LONG: 5}, 512, None),
        (60, {"filtered out by x": 40}, 512, None),
    ],
)  # fmt: skip
def test_a_warning_says_at_which_length_much_of_the_data_is_left_out(
    kept: int, dropped: dict[str, int], most: int, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    run: Any = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(max_length=512)), structure=SimpleNamespace(max_length=most)
    )
    rows: Any = Rows(kept, dropped)
    with caplog.at_level("WARNING"):
        logging.getLogger("halos").propagate = True
        header._warn_of_lengths(run, "train", rows)
    assert list(dict.fromkeys(record.getMessage() for record in caplog.records)) == ([said] if said else [])


def test_keys_are_listed_as_they_would_be_typed() -> None:
    keys = {"ratio": "token", "dual_clip": None, "kl_ratio": True, "beta": 0.1}
    assert header._listed(keys, "  ") == "  ratio=token  dual_clip=null  kl_ratio=true  beta=0.1"


def test_a_loss_has_the_name_that_was_chosen_and_not_that_of_a_function_that_choices_share() -> None:
    loss: Any = SimpleNamespace(name="grpo", settings={"beta": 0.0})
    chosen: Any = SimpleNamespace(loss_choice="dapo")
    own: Any = SimpleNamespace(loss_choice=None)
    assert (header._loss(chosen, loss), header._loss(own, loss)) == ("dapo beta=0.0", "grpo beta=0.0")


@pytest.mark.parametrize(
    ("trained", "frozen", "said"),
    [
        (torch.bfloat16, torch.bfloat16, "held in bfloat16 (model.dtype): an update of less than a 256th of a weight"),
        (torch.float16, torch.float16, "held in float16 (model.dtype): an update of less than a 2048th of a weight"),
        (torch.float32, torch.bfloat16, ""),  # an adapter
    ],
)
def test_weights_that_are_trained_in_half_precision_are_named(
    trained: torch.dtype, frozen: torch.dtype, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(2, 2, dtype=trained), nn.Linear(2, 2, dtype=frozen).requires_grad_(said != ""))
    with caplog.at_level("WARNING"):
        logging.getLogger("halos").propagate = True
        header._warn_of_half_weights(model)
    assert [said in record.getMessage() for record in caplog.records] == ([True] * len(caplog.records) if said else [])
    assert bool(caplog.records) == bool(said)
    one = torch.ones(1, dtype=trained)
    if said:  # the number is that of the arithmetic
        part = int(said.split("than a ")[1].split("th")[0])
        assert one + 0.99 / part == one != one + 1.01 / part
