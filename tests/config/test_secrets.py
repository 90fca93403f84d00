"""What is never taken from a saved run, which may be a stranger's: programs, addresses that a key is sent to, launchers."""

from collections.abc import Callable
from typing import Any

import pytest

from halos.config.schema import Config
from halos.config.secrets import refuse_saved_addresses
from halos.errors import UserError

NAMED = {  # by what a saved run says, which key must be typed again
    "sampler.name=vllm sampler.python=/tmp/evil": "online.sampler.python",
    "sampler.name=vllm sampler.python=null sampler.url=http://evil": "online.sampler.url",
    "sampler.name=openai sampler.url=http://evil": "online.sampler.url",
    "labeller.name=judge labeller.url=http://evil": "online.labeller.url",
    "config_file=/tmp/evil.yaml": "online.config_file",
    "sampler.python=/tmp/idle sampler.url=http://idle labeller.url=http://idle": None,  # of samplers that are not used
}


@pytest.fixture
def online(configure: Callable[..., Config]) -> Callable[[str], Config]:
    config: Any = configure("loss=online", "online.loss=dpo", "online.labeller.functions=[exact_match]")

    def saved(words: str) -> Config:
        for word in words.split():
            key, _, value = word.partition("=")
            section, _, name = key.rpartition(".")
            setattr(getattr(config.online, section) if section else config.online, name, None if value == "null" else value)
        return config

    return saved


@pytest.mark.parametrize(("words", "key"), NAMED.items())
def test_what_is_run_and_where_keys_are_sent_is_typed_again(words: str, key: str | None, online: Callable[[str], Config]) -> None:
    config = online(words)
    if key is not None:
        with pytest.raises(UserError, match=f"names {key}=.*evil.* type it again"):
            refuse_saved_addresses(config, ["train.steps"])
    refuse_saved_addresses(config, [str(key)])
