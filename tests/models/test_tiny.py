"""model=tiny is built in code, always the same, with a lossless tokenizer."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos.data import arithmetic
from halos.models import tiny


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny.build(directory)
    return directory


def test_two_builds_are_equal_byte_for_byte(built: Path, tmp_path: Path) -> None:
    tiny.build(tmp_path / "again")
    for path in sorted(built.iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_an_existing_directory_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    tiny.build(tmp_path / "tiny")
    assert list((tmp_path / "tiny").iterdir()) == []


@pytest.mark.parametrize(
    "text", ["How many apples?", "Grüße, 世界 🙂\n\ttabs  and  spaces", "12 + 345 = 357\n#### 357", "<|x|>", ""]
)
def test_the_tokenizer_is_lossless(built: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_digit_is_a_token_and_so_is_a_word_of_the_problems(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert len(tokenizer("123")["input_ids"]) == 3
    words = [arithmetic.NAMES, arithmetic.THINGS, *arithmetic.VERBS.values()]
    assert all(len(tokenizer(f" {word}")["input_ids"]) == 1 for group in words for word in group)


def test_the_prompt_is_a_prefix_of_the_conversation_and_padding_is_not_the_end(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built)
    row = next(arithmetic.rows("eval"))
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    assert whole.startswith(prompt)
    assert whole.endswith(tokenizer.eos_token)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_it_is_small_and_loads_as_any_model(built: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(built)
    assert 100_000 < model.num_parameters() < 5_000_000
    assert torch.isfinite(model(input_ids=torch.arange(20)[None]).logits).all()
