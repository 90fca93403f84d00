"""Records that seal each other and the configuration: one that was changed, removed or replaced is named."""

import pytest

from halos import seals

CONFIG = "seed: 0\n"


@pytest.fixture
def records() -> dict[str, str]:
    made: dict[str, str] = {}
    for number in range(3):
        before = made.get(f"{number - 1:03d}.yaml")
        made[f"{number:03d}.yaml"] = seals.attempt({"overrides": [f"train.steps={number}"]}, config=CONFIG, before=before)
    return made


def test_unchanged_records_pass_and_records_older_than_seals_are_not_checked(records: dict[str, str]) -> None:
    assert seals.faults(CONFIG, records) == {}
    old = {"000.yaml": "overrides: []\n", "001.yaml": "overrides: []\n"}
    assert seals.faults(CONFIG, old) == {}
    later = seals.attempt({}, config=CONFIG, before=old["001.yaml"])
    assert seals.faults(CONFIG, {**old, "002.yaml": later}) == {}, "a run that an older version began"
    assert list(seals.faults(CONFIG, {"001.yaml": old["001.yaml"] + "x: 1\n", "002.yaml": later})) == ["001.yaml"]


def test_each_record_is_checked_against_the_next_and_the_configuration_against_the_newest(records: dict[str, str]) -> None:
    assert list(seals.faults("seed: 1\n", records)) == ["config.yaml"]
    for name, text in records.items():
        assert list(seals.faults(CONFIG, {**records, name: text.replace("train.steps", "train.stepz")})) == [name]
        for end in (0, 20):  # none of its seal, and half of it
            cut = text[: text.rindex("seal: ") + end]
            assert name in seals.faults(CONFIG, {**records, name: cut})
            assert list(seals.faults(CONFIG, {name: cut})) == [name]
    for name in ("000.yaml", "001.yaml"):
        rest = {other: text for other, text in records.items() if other != name}
        assert seals.faults(CONFIG, rest), "one was taken out"
        forged = seals.attempt({"overrides": ["evil"]}, config=CONFIG, before=None)
        assert list(seals.faults(CONFIG, {**records, name: forged}))[-1] == name, "under a seal of its own"
    assert "002.yaml" in seals.faults(CONFIG, {**records, "002.yaml": "overrides: [evil]\n"})
