"""What decides in launch/compare that a loss equals a peer's, on samples that reach what may differ; no peer is needed."""

import dataclasses
import re
import sys

import pytest
import torch

from halos.certify.subjects import choices
from halos.losses.rollouts import is_clipped
from halos.repository import LAUNCH

sys.path.insert(0, str(LAUNCH / "compare"))
from parity import Row, compared
from parity_rollouts import GSPO, of_grpo
from parity_samples import Samples
from tensors import Outcome

ONE = Outcome(torch.tensor(1.0), torch.tensor([0.5, -0.5]), {"kl": 1.0, "reward": 2.0})
OTHERS = {
    "value": dataclasses.replace(ONE, loss=torch.tensor(1.00001)),
    "gradient": dataclasses.replace(ONE, gradient=torch.tensor([0.5, -0.49999])),
}


@pytest.mark.parametrize("differs", [*OTHERS, None])
@pytest.mark.parametrize("why_not", ["", "a reason"])
def test_a_row_is_as_it_is_said_to_be_only_where_values_and_gradients_agree(differs: str | None, why_not: str) -> None:
    line, as_expected = compared(Row("ours", "theirs", lambda: ONE, lambda: OTHERS.get(str(differs), ONE), why_not=why_not))
    assert as_expected == ((differs is None) == (not why_not))
    assert ("DIFFERS" in line) == (differs is not None and not why_not)
    assert ("2 of 2" in line) == (differs is None)


def test_of_a_gradient_alone_the_value_does_not_count() -> None:
    rows = [Row("ours", "theirs", lambda: ONE, lambda kind=kind: OTHERS[kind], gradient_alone=True) for kind in OTHERS]
    assert [compared(row)[1] for row in rows] == [True, False]


def test_the_samples_are_beyond_every_clip_and_of_uneven_lengths() -> None:
    drawn = Samples.random(6)
    ratio, advantages = (drawn.batch.policy - drawn.batch.reference).exp(), drawn.advantages[:, None] * drawn.batch.mask
    kinds = [is_clipped(ratio, advantages, *bounds) for bounds in ((1.0, 0.2), (0.2, 9.0), (1.0, 9.0, 3.0))]
    assert [int(acts.sum()) > 0 for acts in kinds] == [True, True, True]
    assert len(set(drawn.batch.mask.sum(1).tolist())) > 5
    assert (drawn.advantages == 0).view(4, 4).all(1).tolist() == [False, True, False, False]
    assert ((drawn.far.policy - drawn.far.reference) > 20).sum() == 1
    values = [of_grpo(drawn.batch, drawn.advantages, **keys)().loss.item() for keys in ({}, {"dual_clip": 3.0}, GSPO)]
    assert len(set(values)) == 3


def rows_of(page: str) -> dict[str, dict[str, str]]:
    """Of each name in a first column of losses_by_framework.md its cells by the head of their column."""
    found, heads = {}, list[str]()
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        heads = [] if not cells else heads or cells
        found |= {name: dict(zip(heads, cells, strict=True)) for name in re.findall(r"`([^`]+)`", cells[0] if cells else "")}
    return found


def test_the_page_on_frameworks_has_every_loss_and_calls_equal_what_was_measured_to_be() -> None:
    page = (LAUNCH / "results" / "losses_by_framework.md").read_text()
    rows = rows_of(page)
    assert set(choices()) <= rows.keys()
    for peer, table in (("TRL", "losses_vs_trl.md"), ("verl", "losses_vs_verl.md")):
        measured = (LAUNCH / "results" / table).read_text()
        version = re.search(rf"against ({peer} [\d.]+)", measured)
        assert version is not None
        assert version[1] in page
        ours = [line.split("|")[1] for line in measured.splitlines() if "**equal**" in line]
        for name, cells in rows.items():
            word = name.removeprefix("train.")
            assert not cells.get(peer, "").startswith("equal") or any(re.search(rf"\b{word}\b", each) for each in ours), (
                f"{table} does not show that {peer}'s {name} is equal"
            )
