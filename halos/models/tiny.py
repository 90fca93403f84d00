"""The model of `model=tiny`: a Llama and a tokenizer built in code, so that everything runs without a network."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant", "tool")
MAX_LENGTH = 2048
SEED = 0

# Words of halos.data.arithmetic, one token each, so that its sequences are short. A test compares the two: data and models
# are on one level and do not import each other. Everything else is tokenised as bytes.
WORDS = """
Ada Ben Cleo Dan Eva Finn Gia Hugo Ivy Jon Kim Leo
apples books cards coins cups eggs keys maps pens shells stamps toys
buys finds gets wins drops lends loses sells
How and does has have is many now that
""".split()  # noqa: SIM905  lines of words read better
MARKS = (" + ", " - ", " = ", "\n#### ")

# In this order: an operator between numbers, a digit, a word or a sign with the space before it, white space.
SPLIT_PATTERN = r" [-+=] (?=[0-9])|\n#### (?=[0-9])|[0-9]| ?\p{L}+| ?[^\s\p{L}0-9]|\s"

TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}
{{- raise_exception('no role ' + message['role'] + '; there are system, user, assistant and tool') }}
{%- endif %}
{{- '<|' + message['role'] + '|>' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] or [] %}{{- part['text'] }}{% endfor %}
{%- endif %}
{%- for call in message['tool_calls'] or [] %}{{- (call['function'] or call) | tojson }}{% endfor %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""


def build(directory: Path) -> None:
    """Write the model to `directory`, completely or not at all; an existing one is left unchanged."""
    if directory.exists():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        hidden.chmod(directory.parent.stat().st_mode & 0o777)  # mkdtemp denies access to other users
        _config().save_pretrained(hidden)
        _generation().save_pretrained(hidden)
        _tokenizer().save_pretrained(hidden)
        save_file(_weights(), hidden / "model.safetensors", metadata={"format": "pt"})
        os.rename(hidden, directory)
    except OSError:
        if not directory.exists():  # else another process was first, and wrote the same bytes
            raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def fingerprint() -> str:
    """Hash everything that the files depend on, transformers' version included: their cache key."""
    parts = (_config().to_json_string(use_diff=False), _vocabulary().to_str(), TEMPLATE, str(SEED), str(MAX_LENGTH))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=_vocabulary().get_vocab_size(),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.09,  # about 1 / sqrt(hidden_size): at Llama's 0.02 so narrow a model starts slowly
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )


def _generation() -> GenerationConfig:
    return GenerationConfig(pad_token_id=0, bos_token_id=None, eos_token_id=1)


def _weights() -> dict[str, Tensor]:
    """Draw the weights in the order of their names, independent of the library's order and initialisation."""
    config = _config()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(SEED)  # the global generator is left unchanged
    shapes = sorted((name, parameter.shape) for name, parameter in model.named_parameters())
    return {name: _drawn(shape, generator, config.initializer_range) for name, shape in shapes}


def _drawn(shape: torch.Size, generator: torch.Generator, deviation: float) -> Tensor:
    """Return ones for a norm, else uniform numbers, which unlike normal ones are the same to the bit on every processor."""
    if len(shape) == 1:
        return torch.ones(shape)
    return (torch.rand(shape, generator=generator) * 2 - 1) * (3**0.5 * deviation)


def _vocabulary() -> Tokenizer:
    """Return a byte-level BPE tokenizer without merges: known words are one token, everything else is bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words_and_marks = [form for word in WORDS for form in (word, " " + word)] + list(MARKS)
    special = [PAD, END, *(f"<|{role}|>" for role in ROLES)]
    tokens = [*special, *alphabet, *map(_byte_level, words_and_marks)]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def _byte_level(text: str) -> str:
    """Return `text` in the alphabet of byte-level BPE: 'Ġapples'."""
    ((piece, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return piece


def _tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=_vocabulary(),
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[f"<|{role}|>" for role in ROLES],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )
