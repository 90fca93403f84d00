"""Tokenizers built in code, with templates that imitate those of known model families."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from halos.data.dataset import Dataset, open_dataset
from halos.data.prepare import prepare
from halos.types import Demonstration, Example, Message

CHATML = """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """\
{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}\
{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# As DeepSeek-R1's: the generation prompt opens a thought, and thoughts of earlier turns are left out.
THINKING = """\
{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}\
{{ '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}\
{% else %}{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"""

# As Qwen3's: the last turn keeps its thought, earlier ones lose theirs.
LAST_THOUGHT = """\
{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}\
{{ '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}\
{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + (eos_token if m['role'] == 'assistant' else '') }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

NO_END = """\
{% for m in messages %}{{ ('Q: ' if m['role'] == 'user' else 'A:') + m['content'] + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"""

TOOLS = """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] or '' }}\
{% for call in m['tool_calls'] or [] %}{{ '<tool_call>' + call['function'] | tojson + '</tool_call>' }}{% endfor %}\
{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL += ["<|user|>", "<|assistant|>", "<|good|>", "<|bad|>"]
PLAIN_ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # in the vocabulary whole, but not special
CORPUS = ["Answer the question. What is 12 + 30? It is 42, and no more.\n", "Answers and answer: one two three four five\n"] * 20


def tokenizer(
    template: str | None = CHATML, *, eos: str = "</s>", bos: bool = False, style: str = "bytes"
) -> PreTrainedTokenizerFast:
    """A small BPE tokenizer; with `bos` it adds one to any text itself, as Llama's does.

    `style`: bytes (as GPT-2), prefix (the same, with a space put before words), spm (as Llama-2), unigram (as T5).
    """
    model: Any = models.Unigram() if style == "unigram" else models.BPE(byte_fallback=style == "spm")
    backend = Tokenizer(model)
    if style in ("bytes", "prefix"):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=style == "prefix")
        backend.decoder = decoders.ByteLevel()
    elif style == "spm":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.normalizer = normalizers.Replace(Regex(r"[ ]{2,}"), " ")
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), *"▁\n"})
    if style == "unigram":
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=420, initial_alphabet=alphabet, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
    else:
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token="</s>")
    made.chat_template = template
    return made


def turn(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def user(content: str) -> Message:
    return turn("user", content)


def says(content: str) -> Message:
    return turn("assistant", content)


def jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write rows, one per line, and return the path as an entry of data.train."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(entries: Any, cache: Path, *, kind: type[Example] = Demonstration, **changed: Any) -> Dataset:
    settings: dict[str, Any] = {"max_length": 200, "truncation": "drop", "score": "last", "tokenizer": None, **changed}
    settings["tokenizer"] = settings["tokenizer"] or tokenizer()
    entries = entries if isinstance(entries, list) else [entries]
    return open_dataset(prepare(entries, kind=kind, cache_dir=cache, **settings))
