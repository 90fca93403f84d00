"""Programs, addresses that an API key is sent to, and launchers are never taken from a saved run, which may be a stranger's."""

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import OmegaConf

from halos.config import run_config
from halos.config.schema import Config
from halos.config.secrets import refuse_saved_addresses, refuse_secrets
from halos.errors import UserError


def test_keys_of_one_command_are_not_taken_from_a_saved_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALOS_CACHE", "/mine")
    evil = {"plugins": ["evil"], "overwrite": True, "dry_run": True, "dry_run_rows": 10**9, "resume_changes": "allow",
            "cache_dir": "/evil", "run_dir": "/evil", "resume": "/evil"}  # fmt: skip
    made = run_config.compose_for_resume({**evil, "seed": 3}, "runs/a", "runs/a/checkpoints/step-2")
    assert OmegaConf.to_container(made) == {
        "plugins": [], "overwrite": False, "dry_run": False, "dry_run_rows": 20, "resume_changes": "refuse", "cache_dir": "/mine",
        "run_dir": "runs/a", "resume": "runs/a/checkpoints/step-2", "seed": 3,
    }  # fmt: skip


NAMED = {  # by what a saved run says, which key must be typed again
    "sampler.name=vllm sampler.python=/tmp/evil": "online.sampler.python",
    "sampler.name=vllm sampler.python=null sampler.url=http://evil": "online.sampler.url",
    "sampler.name=openai sampler.url=http://evil": "online.sampler.url",
    "scorer.name=judge scorer.url=http://evil": "online.scorer.url",
    "config_file=/tmp/evil.yaml": "online.config_file",
    "sampler.python=/tmp/idle sampler.url=http://idle scorer.url=http://idle": None,  # of samplers that are not used
}


@pytest.fixture
def online(configure: Callable[..., Config]) -> Callable[[str], Config]:
    config: Any = configure("loss=online", "online.loss=dpo", "online.scorer.functions=[exact_match]")

    def said(words: str) -> Config:
        for word in words.split():
            key, _, value = word.partition("=")
            section, _, name = key.rpartition(".")
            setattr(getattr(config.online, section) if section else config.online, name, None if value == "null" else value)
        return config

    return said


@pytest.mark.parametrize(("words", "key"), NAMED.items())
def test_programs_and_addresses_must_be_passed_again(words: str, key: str | None, online: Callable[[str], Config]) -> None:
    config = online(words)
    if key is not None:
        with pytest.raises(UserError, match=f"names {key}=.*evil.* pass it again"):
            refuse_saved_addresses(config, ["train.steps"])
    refuse_saved_addresses(config, [str(key)])


@pytest.mark.parametrize(
    "name", ["secret_key", "private-key", "apiKey", "passwd", "passphrase", "bearer_token", "githubToken", "pwd"]
)
def test_a_key_that_names_a_secret_is_refused_however_it_is_written(name: str) -> None:
    with pytest.raises(UserError, match=rf"hooks.mine.{name} would be saved in the run's config.yaml"):
        refuse_secrets({"hooks": {"mine": {name: "hunter2"}}})


def test_a_token_is_a_secret_by_its_value_and_a_word_of_a_vocabulary_is_none() -> None:
    for value in ("####", "<|reserved_special_token_12|>", "end-of-the-whole-answer", 7, None):
        refuse_secrets({"hooks": {"mine": {"token": value, "stop_token": value}}})
    for name in ("token", "botToken", "my_token"):
        with pytest.raises(UserError, match=f"hooks.mine.{name} would be saved"):
            refuse_secrets({"hooks": {"mine": {name: "110201543:AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw"}}})
