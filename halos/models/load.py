"""Load a tokenizer, a policy, a reference or a reward model from a directory of safetensors."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from halos.confined import NO_CODE, SAFELY
from halos.distributed.device import seed_all
from halos.errors import UserError, user_errors
from halos.logps import varlen_trial
from halos.logps.attention import SEGMENTS, VARLEN, register
from halos.logps.auto import CLASSES
from halos.logps.hidden import PACKS
from halos.logps.plan import plan_for, remember
from halos.logps.vocabulary import grow
from halos.models.generation import settings_for
from halos.reward_kind import RewardKind

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def load_tokenizer(directory: Path, *, add_tokens: list[str]) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Return the directory's tokenizer with `add_tokens` in its vocabulary, and those of them that it lacked.

    Padding is never trained on, so it may be eos.
    """
    with user_errors(f"{directory}: its tokenizer could not be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(directory, **NO_CODE)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{directory}: only fast tokenizers (tokenizer.json) are supported")
    if tokenizer.eos_token is None:
        raise UserError(f"{directory}: its tokenizer has no end-of-sequence token, so no completion could end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    known = tokenizer.get_vocab()
    new = [token for token in add_tokens if token not in known]
    # no special tokens: decoded text, which rewards and judges read, leaves those out
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in new])
    return tokenizer, new


def keep_marks_special(tokenizer: PreTrainedTokenizerBase, new: Sequence[str]) -> None:
    """Make special tokens of the `new` ones that the chat template writes around turns: they end turns, and decoded text leaves
    them out; what else was added, such as a mark of a thought, is text."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):  # which refuses such turns: by what it holds
        text = str(tokenizer.chat_template)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new if token in text])


def refuse_different_tokenizer(reference: Path, tokenizer: PreTrainedTokenizerBase, new_ids: Sequence[int]) -> None:
    """Raises UserError where a reference has other ids for the policy's tokens: its log-probs would be of other text."""
    theirs = load_tokenizer(reference, add_tokens=[])[0].get_vocab()
    ours = {token: number for token, number in tokenizer.get_vocab().items() if number not in new_ids}
    if different := [token for token, number in ours.items() if theirs.get(token) != number]:
        raise UserError(
            f"reference.name_or_path={reference} has another tokenizer: {len(different)} of the policy's {len(ours)} tokens are"
            f" not the same in it, such as {different[0]!r}; a reference must share the policy's"
        )


def weights_dtype(name: str, *, trained: bool, half: bool) -> torch.dtype:
    """Resolve model.dtype. `auto`: float32 for trained weights, bfloat16 for a frozen base that computes in `half` precision."""
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    return torch.bfloat16 if half and not trained else torch.float32


def attention(name: str, *, half: bool, device: torch.device) -> str:
    """Resolve model.attention. `auto`: flash-attention where it is installed and runs (half precision, GPU), else one kernel for
    all sequences where a trial on this GPU finds it right, else segments. Raises UserError for one that cannot run here."""
    register()
    on_gpu, installed = half and device.type == "cuda", importlib.util.find_spec("flash_attn") is not None
    if name == "flash_attention_2" and not (installed and on_gpu):
        missing = "the package flash-attn: pip install flash-attn" if not installed else "a GPU and bfloat16 (train.precision)"
        raise UserError(f"model.attention=flash_attention_2 needs {missing}; or use model.attention=segments")
    if name == "flash_attention_2" or (name == "auto" and installed and on_gpu):
        return "flash_attention_2"
    if name == "varlen" and not on_gpu:
        raise UserError("model.attention=varlen needs a GPU and bfloat16 (train.precision); or use model.attention=segments")
    if name == "varlen" and (why := varlen_trial.why_not(device)) is not None:
        raise UserError(f"model.attention=varlen: torch's varlen kernel {why}; use model.attention=segments")
    return VARLEN if name == "varlen" or (name == "auto" and on_gpu and varlen_trial.why_not(device) is None) else SEGMENTS


def _quantization(kind: str | None) -> dict[str, Any]:
    if kind is None:
        return {}
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": config}


def load_model(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reward: RewardKind | bool | None,
    dtype: torch.dtype,
    attention: str,
    quantize: str | None = None,
    new_tokens: Sequence[int] = (),
    stops: Sequence[int] = (),
    seed: int = 0,
    empty: bool = False,
    longest: int | None = None,
) -> PreTrainedModel:
    """Load a causal language model, or with `reward` the same backbone with the head of that kind, True being a single score; the
    head is random where there is none.

    Sequences will be packed where `attention` and the architecture allow it; `longest` is the longest of them, where known.
    Embeddings of `new_tokens` start at the mean of the others; `stops` are end tokens of generation. With `empty` its weights
    are neither read nor initialised, and take no memory: this rank gets its shards later, or needs only names and shapes.
    """
    config, reward = read_config(directory), RewardKind.OUTCOME if reward is True else reward or None
    auto, kind = CLASSES[reward], RewardKind.of_architectures(config.architectures)
    _refuse_other_kind(directory, reward, kind, config)
    try:
        plan = plan_for(config, reward=reward, attention=attention, longest=longest)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error
    chosen = plan.attention or (attention if attention not in PACKS else None)
    extra: dict[str, Any] = {"dtype": dtype, "attn_implementation": chosen, **SAFELY, **_quantization(quantize)}
    extra |= reward.labels if reward else {}
    seed_all(seed)  # a fresh score head is initialised here
    with user_errors(f"{directory} could not be loaded as a {auto.__name__}"):
        fresh = reward is not None and kind is not reward
        model = _empty_model(auto, directory, config, extra) if empty else load_weights(auto, directory, extra, fresh_head=fresh)
    remember(model, plan)
    if reward:
        describe_head(model, reward, tokenizer.pad_token_id, fresh=fresh)
    grow(model, len(tokenizer), new_tokens)
    if not reward:
        model.generation_config = settings_for(model.generation_config, tokenizer, stops)
    return model


def load_weights(auto: Any, directory: Path, extra: Mapping[str, Any], *, fresh_head: bool = False) -> PreTrainedModel:
    """Load the model of class `auto` from `directory`. Raises UserError for missing weights, which transformers would initialise
    at random; with `fresh_head` those of the head may be missing,
    or another kind's."""
    model, report = auto.from_pretrained(directory, output_loading_info=True, ignore_mismatched_sizes=fresh_head, **extra)
    known, unexpected = {name for name, _ in model.named_parameters()}, sorted(map(str, report["unexpected_keys"]))
    missing = sorted(name for name in map(str, report["missing_keys"]) if name in known)  # buffers are computed
    if other := [name for name in _mismatched(report) if name.startswith(f"{model.base_model_prefix}.")]:
        raise UserError(f"{directory}: {other[0]} has another shape than its config.json says")
    if fresh_head:
        missing = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
    if missing and "quantization_config" not in extra:
        raise UserError(
            f"{directory} lacks {len(missing)} tensors of a {type(model).__name__}, such as {missing[0]}, which would be"
            " initialised at random. Its files are incomplete, or of another architecture or version than its config.json"
        )
    if unexpected and not fresh_head:  # a reward model does not use the language model's head
        log.warning(
            "%s holds %d tensors that its model does not have, such as %s: ignored", directory, len(unexpected), unexpected[0]
        )
    return model


def _mismatched(report: Mapping[str, Any]) -> list[str]:
    """Return the names of tensors that the files have in another shape: transformers gives each with its shapes, or alone."""
    return [str(each) if isinstance(each, str) else str(each[0]) for each in report.get("mismatched_keys", ())]


def _empty_model(auto: Any, directory: Path, config: PretrainedConfig, extra: dict[str, Any]) -> PreTrainedModel:
    """Construct the model as from_pretrained does, without reading or initialising weights; buffers are computed."""
    if "num_labels" in extra:
        config.num_labels = extra["num_labels"]
    with no_init_weights():
        model = auto.from_config(config, dtype=extra["dtype"], attn_implementation=extra["attn_implementation"], **NO_CODE)
    model.tie_weights()
    if model.can_generate() and (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


def read_config(directory: Path) -> PretrainedConfig:
    """Read a model's config.json, never running code of its directory. Raises UserError for a type that transformers does not
    know, and for an adapter in the same directory, which from_pretrained would attach."""
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} holds a whole model and an adapter side by side, and transformers would attach the adapter: move"
            " adapter_config.json and adapter_model.safetensors into a directory of their own"
        )
    with user_errors(f"{directory}: its config.json could not be loaded"):
        return AutoConfig.from_pretrained(directory, **NO_CODE)


def refuse_different_architecture(base: Path, saved: Path) -> None:
    """Raises UserError where a checkpoint's whole model has another architecture than the run's base."""
    one, other = (_size_facts(read_config(directory)) for directory in (base, saved))
    if names := [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]:
        differences = ", ".join(f"{name} {other.get(name)} instead of {one.get(name)}" for name in names[:4])
        raise UserError(f"{saved} is not the model of this run, {base}: {differences}")


def _size_facts(config: PretrainedConfig) -> dict[str, Any]:
    """Return the config values that decide names and shapes of parameters, but for the vocabulary, which may have grown."""
    facts = config.get_text_config().to_dict()
    sizes = {name: value for name, value in facts.items() if type(value) is int and not name.endswith(("_id", "vocab_size"))}
    return {"model_type": config.model_type, **sizes}


def _refuse_other_kind(directory: Path, wanted: RewardKind | None, kind: RewardKind | None, config: PretrainedConfig) -> None:
    """Raises UserError for a reward model as a language model, and for one with other labels."""
    if wanted is None and kind is not None:
        raise UserError(
            f"{directory} is a reward model ({', '.join(config.architectures or [])}): a policy, reference or teacher is a causal"
            " language model"
        )
    if wanted is not None and kind is wanted:
        _check_labels(directory, wanted, config)


def _check_labels(directory: Path, kind: RewardKind, config: PretrainedConfig) -> None:
    """Raises UserError for a head of another number of labels, and for one whose labels say that they are the other way round."""
    labels = getattr(config, "num_labels", 1)
    if labels != (wanted := kind.labels["num_labels"]):
        what = "a reward model" if kind is RewardKind.OUTCOME else "a process reward model"
        raise UserError(f"{directory} is a classifier with {labels} labels; {what} has {wanted}")
    if kind.reverses(names := getattr(config, "id2label", None) or {}):
        raise UserError(
            f"{directory} names its labels {dict(names)}, and a process reward model's second is that of a good step: its"
            " scores would be read the wrong way round. Exchange both rows of its head, and the names in its config.json"
        )


def describe_head(model: Any, kind: RewardKind, pad: int | None, *, fresh: bool) -> None:
    """Write into a reward model's config what transformers needs to know of its head, which is `fresh` unless it is its base's:
    the padding token, by which it finds the end of a row, and the names of labels."""
    model.config.get_text_config().pad_token_id = pad
    if kind is RewardKind.PROCESS:
        _describe_steps(model, kind, fresh=fresh)


def _describe_steps(model: Any, kind: RewardKind, *, fresh: bool) -> None:
    """Name the labels of a process reward model, unless its head is its base's, which does; and turn off the dropout before its
    head where the base's config asks for none: transformers' default is 0.1, where TRL turns all dropout off."""
    config = model.config
    if fresh or set(config.id2label.values()) == {f"LABEL_{number}" for number in range(len(kind.names))}:
        config.id2label = dict(enumerate(kind.names))
        config.label2id = {name: number for number, name in enumerate(kind.names)}
    asked = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
    if all(each is None for each in asked) and isinstance(dropout := getattr(model, "dropout", None), nn.Dropout):
        config.classifier_dropout = dropout.p = 0.0


def freeze(model: Model) -> Model:
    """Turn off gradients and dropout, for references."""
    return model.requires_grad_(False).eval()
