import json
import logging
from pathlib import Path
from typing import Any
from zlib import crc32

import fastokens
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from halos.data import fast_tokenizer
from halos.data.fast_tokenizer import FastTokenizer
from halos.errors import UserError
from halos.types import Comparison

from .test_prepare import PAIRS
from .tokenizers import CORPUS, PLAIN_ADDED, SPECIAL, jsonl, prepared, tokenizer

WORDS = ["Answer the question.", " What is 12 + 30?", "\n\n", "It is 42", "don't", " naïve", "你好", "👍🏽"]
WORDS += [*SPECIAL, *PLAIN_ADDED]
# how public families split text: Llama 3, Qwen 2, and DeepSeek-V3's second pattern, after numbers
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2 = LLAMA_3.replace("{1,3}", "")
DEEPSEEK = r"[!-/:-~]+[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
STYLES = ["bytes", "prefix", "llama-2", "llama-3", "qwen-2", "deepseek"]


def style_of(name: str) -> PreTrainedTokenizerBase:
    if name in ("bytes", "prefix"):
        return tokenizer(style=name)
    if name == "llama-2":
        return llama_2()
    made = tokenizer(style="bytes")
    backend: Any = made.backend_tokenizer
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    patterns = {"llama-3": [LLAMA_3], "qwen-2": [QWEN_2], "deepseek": [r"\p{N}{1,3}", DEEPSEEK]}[name]
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_alone])
    if name == "qwen-2":
        backend.normalizer = normalizers.NFC()
    return made


def llama_2() -> PreTrainedTokenizerBase:
    """Return one of SentencePiece's kind, with a token for each byte."""
    backend: Any = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=["▁"], special_tokens=special, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def by_library(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [each.ids for each in backend.encode_batch(texts, add_special_tokens=False)]


def in_use(made: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> tuple[FastTokenizer, Any]:
    """Return a tokenizer that has read so much text that it uses fastokens, and what it uses."""
    monkeypatch.setattr(fast_tokenizer, "STARTS_AT", -1)
    fast: Any = FastTokenizer(made.backend_tokenizer)
    assert fast(texts) == by_library(made.backend_tokenizer, texts)
    return fast, fast._fast


class StandIn:
    """fastokens, with another first id for texts that have `word`, and a failure for those that have `poison`."""

    word, poison, loaded = "", "", 0

    def __init__(self, real: Any) -> None:
        self._real = real
        type(self).loaded += 1

    @classmethod
    def from_json_str(cls, text: str) -> "StandIn":
        return cls(fastokens_tokenizer.from_json_str(text))

    def encode_batch_flat(self, texts: list[str], **given: Any) -> tuple[bytes, bytes]:
        if self.poison and any(self.poison in text for text in texts):
            raise ValueError("a text that it does not take")
        data, bounds = self._real.encode_batch_flat(texts, **given)
        ids, starts = np.frombuffer(data, np.uint32).copy(), np.frombuffer(bounds, np.uint64)
        for text, start in zip(texts, starts, strict=False):
            if self.word and self.word in text:
                ids[start] += 1
        return ids.tobytes(), bounds


fastokens_tokenizer = fastokens.Tokenizer


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    class Own(StandIn):
        pass

    monkeypatch.setattr(fastokens, "Tokenizer", Own)
    return Own


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_the_tokenizers_library(style: str, monkeypatch: pytest.MonkeyPatch):
    made = style_of(style)
    fast, used = in_use(made, monkeypatch, WORDS)
    assert used is not None, "fastokens is proved equal, and used"
    monkeypatch.setattr(fast_tokenizer, "CHECKED", 10**9)  # so that this test alone compares

    @settings(max_examples=100, deadline=None)
    @given(some.lists(some.lists(some.sampled_from(WORDS) | some.text(max_size=8), max_size=8).map("".join), max_size=5))
    def equal(texts: list[str]) -> None:
        assert fast(texts) == by_library(made.backend_tokenizer, texts)

    equal()


def test_special_tokens_can_be_read_as_words(monkeypatch: pytest.MonkeyPatch):
    made = tokenizer()
    made.backend_tokenizer.encode_special_tokens = True
    fast, used = in_use(made, monkeypatch, ["a<|im_end|>b", "<think>"])
    assert used is not None
    assert fast(["<|im_end|>"]) == by_library(made.backend_tokenizer, ["<|im_end|>"])
    assert len(fast(["<|im_end|>"])[0]) > 1


def test_a_kind_that_it_does_not_know_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    made = tokenizer(style="unigram")
    with caplog.at_level(logging.INFO):
        _, used = in_use(made, monkeypatch, WORDS)
    assert used is None
    assert "fastokens is not used" in caplog.text


def test_what_its_patterns_take_for_a_blank_is_proved(monkeypatch: pytest.MonkeyPatch):
    """U+180E is one for some engines of regular expressions, which shows after other blanks alone."""
    backend: Any = Tokenizer(models.BPE())
    whole = backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=whole.alphabet(), show_progress=False)
    backend.train_from_iterator(["  \u180e-"] * 20, trainer)  # so that its merges cross what the pattern splits
    pattern = Regex(r"'s| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), whole])
    fast, _ = in_use(PreTrainedTokenizerFast(tokenizer_object=backend), monkeypatch, ["a"])
    texts = ["a \u180e-", "a  \u180e-", "\u180e\n\u180e"]
    assert fast(texts) == by_library(backend, texts)


def test_added_tokens_that_overlap_are_proved(monkeypatch: pytest.MonkeyPatch):
    made = tokenizer()
    backend: Any = made.backend_tokenizer
    backend.add_tokens([AddedToken("foo", normalized=True), AddedToken("oo<", normalized=False)])
    fast, _ = in_use(made, monkeypatch, ["a"])
    assert fast(["foo<a>", "a foo<"]) == by_library(backend, ["foo<a>", "a foo<"])


def test_a_pattern_that_engines_read_differently_is_left_to_the_library(stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch):
    made = tokenizer()
    backend: Any = made.backend_tokenizer
    split = pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*\b)"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, backend.pre_tokenizer])
    assert in_use(made, monkeypatch, WORDS)[1] is None
    assert stand_in.loaded == 0


def test_one_of_another_version_is_not_used(
    stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.delattr(StandIn, "encode_batch_flat")
    with caplog.at_level(logging.INFO):
        assert in_use(tokenizer(), monkeypatch, WORDS)[1] is None
    assert "fastokens is not used: 'Own' object has no attribute 'encode_batch_flat'" in caplog.text


def test_one_that_takes_few_texts_is_not_used(stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch):
    stand_in.poison = "a"
    assert in_use(tokenizer(), monkeypatch, ["a"] * 3000)[1] is None


def test_little_text_does_not_load_it(stand_in: type[StandIn]):
    made = tokenizer()
    fast = FastTokenizer(made.backend_tokenizer)
    assert fast(WORDS) == by_library(made.backend_tokenizer, WORDS)
    assert stand_in.loaded == 0


@pytest.mark.parametrize("word", ["ٱ", "x\u00a0", "<think>", "a question of the user's own"])
def test_one_that_gives_other_ids_is_not_used(
    word: str, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    stand_in.word = "ٱ" if word == "ٱ" else "\u00a0" if "\u00a0" in word else word
    fast, used = in_use(tokenizer(), monkeypatch, ["a question of the user's own"])
    assert (used, stand_in.loaded) == (None, 1)
    assert "gives other token ids" in caplog.text
    assert fast([word]) == by_library(tokenizer().backend_tokenizer, [word])
    assert stand_in.loaded == 1  # it is not tried again


def test_one_that_turns_out_to_give_other_ids_stops_the_work(stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch):
    texts = [f"text {n}" for n in range(300)]
    stand_in.word = next(text for text in texts if crc32(text.encode()) % fast_tokenizer.CHECKED == 0)
    unchecked = [text for text in texts if crc32(text.encode()) % fast_tokenizer.CHECKED]
    fast, used = in_use(tokenizer(), monkeypatch, ["a"])
    assert used is not None
    fast(unchecked[:100])
    for others in ([], unchecked[:50], unchecked):  # wherever it stands, so that a second start finds it too
        with pytest.raises(UserError, match=f"'{stand_in.word}'.*pip uninstall fastokens"):
            fast([*others, stand_in.word])


def test_the_library_gets_a_text_that_it_cannot_take(stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch):
    made = tokenizer()
    fast, used = in_use(made, monkeypatch, ["a"])
    assert used is not None
    stand_in.poison, texts = "poison", ["one", "a poison", "two", "three poisons", "", "four"]
    assert fast(texts) == by_library(made.backend_tokenizer, texts)


def test_a_panic_of_rust_is_a_failure_and_a_stop_is_not(stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch):
    class PanicException(BaseException):
        pass

    class StopRequested(BaseException):
        pass

    made = tokenizer()
    fast, _ = in_use(made, monkeypatch, ["a"])
    raised: type[BaseException] = PanicException

    def fail(*_: Any, **__: Any) -> Any:
        raise raised

    monkeypatch.setattr(fast._fast, "_encode", fail)
    assert fast(["one", "two"]) == by_library(made.backend_tokenizer, ["one", "two"])
    raised = StopRequested
    with pytest.raises(StopRequested):
        fast(["one", "two"])


def test_it_is_loaded_anew_before_its_memory_of_words_grows_large(stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch):
    fast, _ = in_use(tokenizer(), monkeypatch, ["a"])
    monkeypatch.setattr(fast_tokenizer, "RENEWED_AFTER", 100)
    sizes = iter([fast._resident + 10, fast._resident + fast_tokenizer.MOST_GROWTH + 10])
    monkeypatch.setattr(fast_tokenizer, "_resident", lambda: next(sizes))
    for _ in range(10):
        fast(["x" * 30])
    assert stand_in.loaded == 2  # after the eighth, not after the fourth


def test_without_it_the_library_does_all(monkeypatch: pytest.MonkeyPatch, stand_in: type[StandIn]):
    monkeypatch.setattr(fast_tokenizer, "LIBRARY", "a-package-that-nobody-has")
    assert fast_tokenizer.version() == ""
    assert in_use(tokenizer(), monkeypatch, WORDS)[1] is None
    assert stand_in.loaded == 0


def test_a_data_set_has_the_same_content_by_both_and_other_places_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entry = jsonl(tmp_path / "a.jsonl", PAIRS)
    monkeypatch.setattr(fast_tokenizer, "STARTS_AT", -1)
    for version in ("1.0", "1.1", ""):
        monkeypatch.setattr(fast_tokenizer, "version", lambda version=version: version)
        prepared(entry, tmp_path / "cache", kind=Comparison)
    metas = [json.loads(each.read_text()) for each in tmp_path.glob("cache/data/*/meta.json")]
    assert len(metas) == 3
    assert len({meta["content"] for meta in metas}) == 1
