"""Every number of halos/losses/worked.yaml is that of its formula, which shares no code with the losses."""

import pytest

from tests.losses import worked

EXAMPLES = worked.examples()


@pytest.mark.parametrize("loss", sorted(EXAMPLES))
def test_the_worked_numbers_of_a_loss_are_those_of_its_formula(loss: str) -> None:
    assert loss in worked.FORMULAS, f"{loss} needs a formula in NumPy: in tests/losses/worked_pairs.py, or worked_tokens.py"
    for number, example in enumerate(EXAMPLES[loss], 1):
        results = worked.numbers(loss, example)
        given = {name: example[name] for name in (*worked.FOUND, "gradient", "metrics") if name in example}
        assert given.keys() - {"metrics"}, f"example {number} gives no result"
        assert list(worked.differences(given, results)) == [], f"example {number}"


def test_the_formulas_call_nothing_of_halos() -> None:
    for module in (worked, worked.worked_pairs, worked.worked_tokens):
        imported = {value.__module__ for value in vars(module).values() if hasattr(value, "__module__")}
        assert not [name for name in imported if name.partition(".")[0] in ("halos", "torch")]
