"""Old names of keys are accepted in overrides, saved runs, records and YAML files."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from halos.config import renamed_keys, resume_policy, run_config
from halos.config.content_hashes import ContentHashes
from halos.config.schema import key_facts

OLD = {"online": {"labeller": {"name": "judge", "url": None}, "rounds": 2}, "seed": 1}
NEW = {"online": {"scorer": {"name": "judge", "url": None}, "rounds": 2}, "seed": 1}


@pytest.mark.parametrize(
    ("typed", "taken"),
    [
        ("online.labeller.name=judge", "online.scorer.name=judge"),
        ("++online.labeller.functions=[{function: mine.a=b}]", "++online.scorer.functions=[{function: mine.a=b}]"),
        ("~online.labeller.model", "~online.scorer.model"),
        ("online.labeller={name: judge}", "online.scorer={name: judge}"),
        ("online.labellers.name=x", "online.labellers.name=x"),
        ("exp_name=online.labeller.name", "exp_name=online.labeller.name"),
    ],
)
def test_an_override_gets_the_current_name(typed: str, taken: str) -> None:
    assert renamed_keys.rename_override(typed) == taken
    assert bool(renamed_keys.deprecation_note([typed])) is (typed != taken)


def test_every_new_name_is_a_key_and_no_old_one_is() -> None:
    keys = [key for key, _ in key_facts()]
    for old, new in renamed_keys.SECTIONS.items():
        assert any(key.startswith(new) for key in keys)
        assert not any(key.startswith(old) for key in keys)


def test_values_saved_under_an_old_name_are_read_under_the_new_one() -> None:
    assert renamed_keys.with_current_names(OLD) == NEW
    assert resume_policy.value_at(OLD, "online.scorer.name") == resume_policy.value_at(NEW, "online.scorer.name") == "judge"
    assert resume_policy.has_key(OLD, "online.scorer.url")
    assert not resume_policy.has_key(OLD, "online.scorer.label")
    record = "changed: {online.labeller.url: [null, here]}"
    assert run_config.changed_keys(record).keys() == {"online.scorer.url"}
    content = ContentHashes.from_record({"content": {"online.labeller.model": "h"}, "sources": {}})
    assert content is not None
    assert content.hashes == {"online.scorer.model": "h"}


def test_a_yaml_with_the_old_name_counts_except_for_overrides_of_the_new_one() -> None:
    tree: Any = {"online": {"scorer": {"name": "function", "model": "typed"}, "labeller": {"name": "judge", "model": "${seed}"}},
                 "seed": 3}  # fmt: skip
    composed = OmegaConf.create(tree)
    OmegaConf.set_struct(composed, True)
    renamed_keys.move_sections(composed, ["online.scorer.model=typed"])
    assert OmegaConf.to_container(composed) == {"online": {"scorer": {"name": "judge", "model": "typed"}}, "seed": 3}
    assert OmegaConf.is_struct(composed)
