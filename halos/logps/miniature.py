"""A small random model of a given architecture, to try in a fraction of a second how its log-probs can be computed.

It has one layer of each kind and a vocabulary of a few hundred tokens; attention windows shrink so that short sequences exceed
them. Nothing is read from disk, so every rank builds the same model.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from halos.confined import NO_CODE
from halos.logps.vocabulary import table
from halos.types import Sequences

log = logging.getLogger(__name__)

VOCABULARY = 256
WINDOW = 8  # tokens: sequences of the trial are longer
MAX_LAYERS = 8  # some architectures give each layer a constant of its own, so that every layer is a kind
FEW = {"index_topk": WINDOW, "index_block_size": WINDOW, "index_topk_blocks": 2}  # keys, or blocks of keys, that a query reads
FROM_THE_FIRST = ("floor_scale",)  # tokens after which a layer changes that counts them from the first of a batch
LARGE = 2**26  # parameters beyond which experts and feed-forward layers are narrowed
SPREAD = 8.0  # standard deviation of the logits: large enough that a soft cap or a scale shows
UNUSED = ("vocab_size", "_name_or_path", "dtype", "transformers_version", "architectures", "quantization_config", "num_labels",
        "id2label", "label2id", "use_cache")  # fmt: skip


def small_config(config: PretrainedConfig, *, longest: int | None) -> PretrainedConfig:
    """A configuration with the same arithmetic and a small vocabulary, unquantized. `longest`: tokens of the run's longest
    sequence, where known; whatever takes effect only beyond it is left alone."""
    small = copy.deepcopy(config)
    for part in _parts(small):
        part.__dict__.pop("quantization_config", None)
        part._attn_implementation_internal = None  # transformers' own choice again
        part.dtype = torch.float32  # position tables are computed in it, and would keep its rounding
        length_dependent = _rope_types(vars(part)) & {"dynamic", "longrope"}
        for name, value in list(vars(part).items()):
            with suppress(ValueError, TypeError):  # a configuration may refuse another value, and then keeps its own
                setattr(part, name, _smaller(name, value, longest, length_dependent))
    small.get_text_config().vocab_size = VOCABULARY
    return small


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _rope_types(settings: Mapping[str, Any]) -> set[str]:
    """The types of rotary embeddings anywhere in the settings."""
    inner = [_rope_types(value) for name, value in settings.items() if isinstance(value, dict)]
    return set().union(*inner, {str(settings.get("rope_type"))})


def _smaller(name: str, value: Any, longest: int | None, length_dependent: set[str]) -> Any:
    """Shrink the limits that the run's sequences exceed, so that the trial's do too: windows, chunks, and the length at which
    rotary embeddings that depend on the longest sequence of a batch (`length_dependent`) change."""
    if isinstance(value, dict):
        return {key: _smaller(str(key), part, longest, length_dependent) for key, part in value.items()}
    if type(value) is not int:
        return value
    if name == "pad_token_id" and value >= VOCABULARY:
        return 0
    if name in FEW or name in FROM_THE_FIRST:  # whether a run's sequences exceed them cannot be told from this value alone
        return min(value, FEW.get(name, WINDOW))
    reached = longest is None or longest > value
    if reached and value > WINDOW and ("window" in name or "chunk_size" in name):
        return WINDOW
    changes = name == "original_max_position_embeddings" or (name == "max_position_embeddings" and "dynamic" in length_dependent)
    return 2 * WINDOW if length_dependent and reached and changes else value


def key_of(config: PretrainedConfig) -> str:
    """A key that is equal for configurations with the same arithmetic."""
    plain = copy.deepcopy(config)
    for part in _parts(plain):
        for name in [name for name in vars(part) if name in UNUSED or name.endswith("token_id")]:
            part.__dict__.pop(name)
    return f"{type(config).__name__} {plain.to_json_string(use_diff=False)}"


def build(auto: Any, config: PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model on the CPU, in evaluation mode, with transformers' own choice of attention.

    `config` is a `small_config`.
    """
    small = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _with_few_layers(auto, small)
        if sum(parameter.numel() for parameter in model.parameters()) > LARGE:
            _narrow(small)
            model = _with_few_layers(auto, small)
        if model.device.type == "meta":
            model = model.to_empty(device="cpu")
            model.initialize_weights()
            model.tie_weights()
        model = model.float().eval()
        _randomise(model)
    return model


def _with_few_layers(auto: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model with the first layers of each kind; on the meta device where no configuration describes just these layers."""
    with torch.device("meta"):
        full = auto.from_config(copy.deepcopy(config), **NO_CODE)
    stacks = _stacks(full, config)
    kinds = [tuple(_kind(stack[number], number) for stack in stacks) for number in range(len(stacks[0]))] if stacks else []
    for each in (1, 2):  # some architectures need a second layer of a kind, which shares the first one's weights
        kept = [number for number, kind in enumerate(kinds) if kinds[:number].count(kind) < each][: each * MAX_LAYERS]
        if len(kept) == len(kinds):
            break
        if (model := _from_fewer_layers(auto, config, kept, [kinds[number] for number in kept])) is not None:
            return model
    kept = sorted(kinds.index(kind) for kind in set(kinds))[:MAX_LAYERS]
    small = sum(parameter.numel() for parameter in full.parameters()) < LARGE
    return auto.from_config(config, **NO_CODE) if small or len(kept) == len(kinds) else _drop_layers(full, stacks, kept)


def _from_fewer_layers(
    auto: Any, config: PretrainedConfig, kept: list[int], kinds: list[tuple[str, ...]]
) -> PreTrainedModel | None:
    """The model of a configuration reduced to the kept layers; None where its layers are not of these kinds."""
    fewer = copy.deepcopy(config)
    _keep_layers(fewer, kept)
    try:
        model = auto.from_config(fewer, **NO_CODE)
    except Exception:  # whatever an architecture checks of its configuration
        return None
    stacks = _stacks(model, fewer)
    same = bool(stacks) and [tuple(_kind(stack[n], n) for stack in stacks) for n in range(len(kept))] == kinds
    return model if same else None


def _stacks(model: PreTrainedModel, config: PretrainedConfig) -> list[nn.ModuleList]:
    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    return [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth > 0]


def _keep_layers(config: PretrainedConfig, kept: list[int]) -> None:
    """Reduce every per-layer setting of a configuration to the kept layers."""
    text = config.get_text_config()
    usual = type(text)()
    for name, value in list(vars(text).items()):
        if _length(value) == text.num_hidden_layers and not _is_as_long_by_chance(name, value, usual):
            setattr(text, name, [value[number] for number in kept])
    text.num_hidden_layers = len(kept)


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list | tuple) else None


def _is_as_long_by_chance(name: str, value: Any, usual: PretrainedConfig) -> bool:
    """Whether a list is not per layer: it has the same length in the default configuration, whose depth is another."""
    return _length(getattr(usual, name, None)) == _length(value) != getattr(usual, "num_hidden_layers", None)


def _drop_layers(model: PreTrainedModel, stacks: list[nn.ModuleList], kept: list[int]) -> PreTrainedModel:
    """The model, and its configuration, with only the kept layers."""
    for stack in stacks:
        layers = [stack[number] for number in kept]
        for number, layer in enumerate(layers):
            _renumber(layer, kept[number], number)
        stack._modules.clear()
        stack.extend(layers)
    _keep_layers(model.config, kept)
    return model


def _kind(layer: nn.Module, number: int) -> str:
    """A layer's classes, constants and shapes as text, its index apart: equal for layers of one kind."""
    parts = []
    for name, module in layer.named_modules():
        constants = {key: value for key, value in vars(module).items() if type(value) in (bool, int, float, str)}
        constants = {k: value for k, value in constants.items() if not (k.startswith("_") or _is_layer_index(k, value, number))}
        shapes = [(key, tuple(value.shape)) for key, value in module._parameters.items() if value is not None]
        parts.append((name, type(module).__qualname__, sorted(constants.items()), shapes))
    return repr(parts)


def _is_layer_index(name: str, value: Any, number: int) -> bool:
    return type(value) is int and value == number and any(word in name for word in ("idx", "index", "layer", "block"))


def _renumber(layer: nn.Module, before: int, number: int) -> None:
    for module in layer.modules():
        for name, value in list(vars(module).items()):
            if _is_layer_index(name, value, before):
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
    """Move every parameter away from its initial value: norms at 1, biases at 0 and small weights hide mistakes."""
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
    return torch.randint(VOCABULARY // 4, VOCABULARY, (length,), generator=generator)


def sequences(rows: Sequence[Tensor]) -> Sequences:
    """Sequences packed end to end; every token but the first of each is scored."""
    lengths = tuple(len(row) for row in rows)
    starts = [0, *accumulate(lengths)][:-1]
    positions = torch.cat([torch.arange(length) for length in lengths])
    sources = torch.cat([start + torch.arange(length - 1) for start, length in zip(starts, lengths, strict=True)])
    columns = torch.cat([torch.arange(length - 1) for length in lengths])
    number = torch.cat([torch.full((length - 1,), n) for n, length in enumerate(lengths)])
    ids = torch.cat(list(rows))
    trees, leaves = tuple((length,) for length in lengths), tuple(range(len(rows)))
    return Sequences(ids, positions, trees, leaves, ids[sources + 1], sources, number, columns, max(lengths) - 1)


def tree(trunk: Tensor, branches: Sequence[Tensor]) -> Sequences:
    """Sequences that share a trunk, as `hidden_states` reads them."""
    positions = [torch.arange(len(trunk)), *(len(trunk) + torch.arange(len(each)) for each in branches)]
    return replace(
        sequences([torch.cat([trunk, *branches])]), positions=torch.cat(positions), leaves=tuple(range(len(branches))),
        trees=((len(trunk), *map(len, branches)),),
    )  # fmt: skip
