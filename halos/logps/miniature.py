"""A small random model of a given architecture, for trying how its log-probs can be computed: a fraction of a second.

One layer of each kind stays, and a few hundred words; windows shrink so that short rows reach over them. Nothing is read from
a disk, so every process builds the same one.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from halos.confined import NO_CODE
from halos.logps.vocabulary import table

log = logging.getLogger(__name__)

WORDS = 256
WINDOW = 8  # tokens: rows of the trial are longer
KINDS = 8  # layers at most: some architectures give each layer a constant of its own
LARGE = 2**26  # parameters beyond which experts and feed-forward layers are narrowed
SPREAD = 8.0  # standard deviation of the logits: a soft cap or a scale shows
FREE = ("vocab_size", "_name_or_path", "dtype", "transformers_version", "architectures", "quantization_config", "num_labels",
        "id2label", "label2id", "use_cache")  # fmt: skip


def small_config(config: PretrainedConfig, *, longest: int | None) -> PretrainedConfig:
    """What an architecture computes by, without what weights and tokenizers add. `longest`: tokens of the longest row that a
    run has, where that is known; what begins beyond it is no concern."""
    small = copy.deepcopy(config)
    for part in _parts(small):
        part.__dict__.pop("quantization_config", None)
        part._attn_implementation_internal = None  # transformers' own choice again
        part.dtype = torch.float32  # tables of positions are computed in it, and would stay as coarse as it is
        moving = _kinds_of_rope(vars(part)) & {"dynamic", "longrope"}
        for name, value in list(vars(part).items()):
            with suppress(ValueError, TypeError):  # a configuration may refuse another value: that one stays
                setattr(part, name, _smaller(name, value, longest, moving))
    small.get_text_config().vocab_size = WORDS
    return small


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _kinds_of_rope(settings: Mapping[str, Any]) -> set[str]:
    """Of rotary embeddings, wherever in the settings they are told."""
    inner = [_kinds_of_rope(value) for name, value in settings.items() if isinstance(value, dict)]
    return set().union(*inner, {str(settings.get("rope_type"))})


def _smaller(name: str, value: Any, longest: int | None, moving: set[str]) -> Any:
    """Limits that rows of the run reach are reached by those of the trial: windows, chunks, and where rotary embeddings change
    with the longest row of a batch (`moving`)."""
    if isinstance(value, dict):
        return {key: _smaller(str(key), part, longest, moving) for key, part in value.items()}
    if type(value) is not int:
        return value
    if name == "pad_token_id" and value >= WORDS:
        return 0
    reached = longest is None or longest > value
    if reached and value > WINDOW and ("window" in name or "chunk_size" in name):
        return WINDOW
    changes = name == "original_max_position_embeddings" or (name == "max_position_embeddings" and "dynamic" in moving)
    return 2 * WINDOW if moving and reached and changes else value


def key_of(config: PretrainedConfig) -> str:
    """The same for configurations that compute in the same way."""
    plain = copy.deepcopy(config)
    for part in _parts(plain):
        for name in [name for name in vars(part) if name in FREE or name.endswith("token_id")]:
            part.__dict__.pop(name)
    return f"{type(config).__name__} {plain.to_json_string(use_diff=False)}"


def build(auto: Any, config: PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model on the CPU, in evaluation mode, with transformers' own choice of attention.

    `config` is a `small_config`.
    """
    small = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _cut(auto, small)
        if sum(parameter.numel() for parameter in model.parameters()) > LARGE:
            _narrow(small)
            model = _cut(auto, small)
        if model.device.type == "meta":
            model = model.to_empty(device="cpu")
            model.initialize_weights()
            model.tie_weights()
        model = model.float().eval()
        _randomise(model)
    return model


def _cut(auto: Any, config: PretrainedConfig) -> PreTrainedModel:
    """The first layers of each kind, still without weights where the configuration alone cannot ask for just these."""
    with torch.device("meta"):
        whole = auto.from_config(copy.deepcopy(config), **NO_CODE)
    stacks = _stacks(whole, config)
    kinds = [tuple(_kind(stack[number], number) for stack in stacks) for number in range(len(stacks[0]))] if stacks else []
    for each in (1, 2):  # some architectures are not themselves without a second layer of a kind: one shares the other's weights
        kept = [number for number, kind in enumerate(kinds) if kinds[:number].count(kind) < each][: each * KINDS]
        if len(kept) == len(kinds):
            break
        if (model := _asked(auto, config, kept, [kinds[number] for number in kept])) is not None:
            return model
    kept = sorted(kinds.index(kind) for kind in set(kinds))[:KINDS]
    small = sum(parameter.numel() for parameter in whole.parameters()) < LARGE
    return auto.from_config(config, **NO_CODE) if small or len(kept) == len(kinds) else _without(whole, stacks, kept)


def _asked(auto: Any, config: PretrainedConfig, kept: list[int], kinds: list[tuple[str, ...]]) -> PreTrainedModel | None:
    """The model of a configuration that tells of the kept layers alone, if that has layers of these kinds."""
    less = copy.deepcopy(config)
    _keep(less, kept)
    try:
        model = auto.from_config(less, **NO_CODE)
    except Exception:  # whatever an architecture checks of its configuration
        return None
    stacks = _stacks(model, less)
    same = bool(stacks) and [tuple(_kind(stack[n], n) for stack in stacks) for n in range(len(kept))] == kinds
    return model if same else None


def _stacks(model: PreTrainedModel, config: PretrainedConfig) -> list[nn.ModuleList]:
    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    return [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth > 0]


def _keep(config: PretrainedConfig, kept: list[int]) -> None:
    """Of everything that a configuration says layer by layer, what it says of the kept ones."""
    text = config.get_text_config()
    usual = type(text)()
    for name, value in list(vars(text).items()):
        if _length(value) == text.num_hidden_layers and not _is_of_no_layer(name, value, usual):
            setattr(text, name, [value[number] for number in kept])
    text.num_hidden_layers = len(kept)


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list | tuple) else None


def _is_of_no_layer(name: str, value: Any, usual: PretrainedConfig) -> bool:
    """Whether a setting is as long as this by chance: it is in a model of the usual depth, which is another."""
    return _length(getattr(usual, name, None)) == _length(value) != getattr(usual, "num_hidden_layers", None)


def _without(model: PreTrainedModel, stacks: list[nn.ModuleList], kept: list[int]) -> PreTrainedModel:
    """The model without the other layers, which its own configuration no longer tells of."""
    for stack in stacks:
        layers = [stack[number] for number in kept]
        for number, layer in enumerate(layers):
            _renumber(layer, kept[number], number)
        stack._modules.clear()
        stack.extend(layers)
    _keep(model.config, kept)
    return model


def _kind(layer: nn.Module, number: int) -> str:
    """What a layer is made of; the number of its place apart."""
    parts = []
    for name, module in layer.named_modules():
        facts = {key: value for key, value in vars(module).items() if type(value) in (bool, int, float, str)}
        facts = {key: value for key, value in facts.items() if not (key.startswith("_") or _is_place(key, value, number))}
        shapes = [(key, tuple(value.shape)) for key, value in module._parameters.items() if value is not None]
        parts.append((name, type(module).__qualname__, sorted(facts.items()), shapes))
    return repr(parts)


def _is_place(name: str, value: Any, number: int) -> bool:
    return type(value) is int and value == number and any(word in name for word in ("idx", "index", "layer", "block"))


def _renumber(layer: nn.Module, before: int, number: int) -> None:
    for module in layer.modules():
        for name, value in list(vars(module).items()):
            if _is_place(name, value, before):
                setattr(module, name, number)


def _narrow(config: PretrainedConfig) -> None:
    for part in _parts(config):
        for name, value in list(vars(part).items()):
            if type(value) is not int:
                continue
            if "experts" in name and "per_tok" not in name and value > 16:
                setattr(part, name, 16)
            elif "intermediate" in name and value > 512:
                setattr(part, name, 512)


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Move every parameter away from where it starts: norms at 1 and biases at 0 hide mistakes, and so do small weights."""
    for parameter in {id(p): p for p in model.parameters()}.values():
        if parameter.dim() >= 2:
            bound = (3.0 / parameter.shape[-1]) ** 0.5
            parameter.uniform_(-bound, bound)
        elif parameter.is_floating_point():
            parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    layer = model.get_output_embeddings()
    if layer is None:
        return
    spread = _logits(model).std().item()
    if 0 < spread < float("inf"):
        table(layer).mul_(SPREAD / spread)


def _logits(model: Any) -> Tensor:
    return model(input_ids=row(24)[None], use_cache=False).logits


def row(length: int, seed: int = 0) -> Tensor:
    """Token ids that are neither padding nor any other special token in most vocabularies: (length,) int64."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(WORDS // 4, WORDS, (length,), generator=generator)
