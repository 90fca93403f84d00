"""Generation settings saved with a model are accepted by transformers and have the end tokens of training."""

import logging
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from halos.data.tokenize import end_of_turn
from halos.errors import UserError
from halos.models import tiny
from halos.models.generation import settings_for

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" \
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    place = tmp_path_factory.mktemp("tiny") / "tiny"
    tiny.build(place)
    return AutoTokenizer.from_pretrained(place)


SETTINGS = [
    ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, ["temperature", "top_p"]),
    ({"do_sample": False, "temperature": 0.9, "top_p": 0.6, "repetition_penalty": 1.1}, ["temperature", "top_p"]),
    ({"length_penalty": 0.5}, ["length_penalty"]),
    ({"do_sample": True, "temperature": 0.9, "top_p": 0.6}, []),
]


@pytest.mark.parametrize(("settings", "removed"), SETTINGS, ids=lambda part: str(part)[:40])
def test_settings_that_transformers_refuses_to_save_are_removed_with_a_warning(
    settings: dict[str, object], removed: list[str], tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = GenerationConfig(**settings)
    with caplog.at_level(logging.WARNING):
        kept = settings_for(given, tokenizer, [])
    kept.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path).to_diff_dict()
    wanted = {name: value for name, value in settings.items() if name not in removed and value is not False}
    assert {name: saved[name] for name in wanted} == wanted
    assert not saved.keys() & set(removed)
    assert all(name in caplog.text for name in removed)
    assert bool(caplog.text) == bool(removed)
    assert all(getattr(given, name) == value for name, value in settings.items()), "the model's own settings were changed"


def test_settings_that_cannot_be_corrected_are_refused(tokenizer) -> None:
    broken = GenerationConfig()
    broken.logits_processor = [1]
    with pytest.raises(UserError, match="logits_processor"):
        settings_for(broken, tokenizer, [])


def test_the_token_that_ends_a_turn_in_training_ends_generation(tokenizer) -> None:
    assert end_of_turn(tokenizer) == (tokenizer.convert_tokens_to_ids("<|end|>"),)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    before, tokenizer.chat_template = tokenizer.chat_template, CHATML
    try:
        (end,) = end_of_turn(tokenizer)
    finally:
        tokenizer.chat_template = before
    assert tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"
    settings = settings_for(GenerationConfig(eos_token_id=5), tokenizer, [end])
    assert settings.eos_token_id == [tokenizer.eos_token_id, 5, end]
