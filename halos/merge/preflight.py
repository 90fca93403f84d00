"""Try a run's final merge and its proof before the first step, without loading the base's weights.

A merge fails on names, shapes or formulas. Names and shapes are those of the base's files and of the adapter on the meta device.
Formulas are tried on a block of each kind of layer; and the whole merge, proof included, on a small model of the architecture
with an adapter of the same settings, whose random factors change the outputs by a tenth: an adapter that hardly changes them
would hide faults of the formulas.

That a merge passed is remembered in cache_dir by the content of everything it depends on.
"""

import hashlib
import json
import logging
import tempfile
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from halos import confined
from halos.confined import NO_CODE
from halos.errors import UserError, user_errors
from halos.hashes import file_hashes, source_hash
from halos.logps import miniature
from halos.logps.vocabulary import Vocabulary, grow
from halos.merge import deviation, expected, lora, merge, proof
from halos.merge.base_weights import BaseWeights
from halos.merge.lora import KEEP
from halos.merge.probe import ProbeOutputs, bit_sums_of, outputs_and_routes, outputs_of, probe_ids, rms, rounding_unit
from halos.merge.routing import Routes
from halos.merge.safetensors_io import weight_files, write_empty
from halos.reward_kind import RewardKind
from halos.versions import versions

log = logging.getLogger(__name__)

CHANGE = 0.1  # of the outputs by the random adapter, as a fraction of their root mean square
ALL_LINEAR: dict[str, Any] = {
    "target_modules": "all-linear", "target_parameters": None, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip
ROWS = 64  # merged of each kind of layer
CODE = ("merge", "logps", "models/adapter.py", "models/targets.py", "confined.py")  # source files that a merge depends on


def check_merge_once(case: proof.Case, model: PeftModel, cache_dir: Path) -> None:
    """`check_merge`, unless it has passed before with this base, adapter, code and packages. Raises UserError as it does."""
    path = cache_dir / "merges" / key_of(case, model, cache_dir)
    if path.is_file():
        return
    if check_merge(case, model):
        path.parent.mkdir(parents=True, exist_ok=True)
        confined.write_whole(path, "")


def key_of(case: proof.Case, model: PeftModel, cache_dir: Path) -> str:
    """A hash of everything that `check_merge` depends on."""
    settings = {**model.peft_config["default"].to_dict(), "base_model_name_or_path": None}
    trained = {name: list(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}
    files = file_hashes([case.base / "config.json", *weight_files(case.base)], cache_dir)
    what = [
        case.reward and case.reward.name,
        str(case.dtype),
        case.vocabulary,
        list(case.tokens),
        type(model.get_base_model()).__name__,
    ]
    parts = [settings, trained, files, what, versions()["packages"], source_hash(CODE)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def check_merge(case: proof.Case, model: PeftModel) -> bool:
    """Raises UserError if `model`, which may be on the meta device, could not be merged, or its merge not be proved, at the end
    of the run. The adapter of `case` need not exist yet. Returns whether this very adapter could be tried on a small model."""
    lora.refuse_uncovered(model.peft_config["default"])
    with tempfile.TemporaryDirectory(prefix="halos-") as name:
        directory = Path(name)
        _check_shapes(case, model, directory)
        _check_blocks(case, model, directory)
        return _check_small_model(case, model, directory)


def _check_shapes(case: proof.Case, model: PeftModel, directory: Path) -> None:
    """Check that merge, proof and from_pretrained agree on names and shapes of the merged tensors."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    adapter = _save_config(model, directory / "shapes")
    write_empty(adapter / "adapter_model.safetensors", {name: list(value.shape) for name, value in state.items()})
    inner = model.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    planned = merge.plan(case.base, adapter, inner, case.vocabulary, case.tokens)
    shapes = {name: entry.shape for name, entry in planned.entries(case.dtype).items()}
    proved = expected.expected_model(case.base, adapter, case.empty_model(), case.vocabulary, case.tokens).tensors
    expected_shapes = {name: tensor.shape for name, tensor in proved.items()}
    if wrong := sorted(name for name in shapes.keys() | expected_shapes.keys() if shapes.get(name) != expected_shapes.get(name)):
        raise UserError(
            f"cannot merge: {wrong[0]} would be {shapes.get(wrong[0], 'absent')} and ought to be"
            f" {expected_shapes.get(wrong[0], 'absent')}; {KEEP}"
        )
    _check_loading(case, planned.config_of(inner, case.dtype), shapes)


def _check_loading(case: proof.Case, config: Any, shapes: dict[str, list[int]]) -> None:
    """Check that from_pretrained loads tensors of these names and shapes, on the meta device."""
    state = {name: torch.empty(shape, dtype=case.dtype, device="meta") for name, shape in shapes.items()}
    kind: Any = type(case.empty_model())
    _, report = kind.from_pretrained(None, config=config, state_dict=state, device_map="meta", output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            names = ", ".join(sorted(map(str, report[what]))[:3])
            raise UserError(f"cannot merge: loading the merged model would find {what.replace('_', ' ')}: {names}; {KEEP}")


def _check_blocks(case: proof.Case, model: PeftModel, directory: Path) -> None:
    """Check the formulas on the first rows of one layer of each kind, merged from the base's weights and random factors."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    layers = merge.trained_tensors(model).updates
    kinds: dict[Any, str] = {}
    for layer, parts in layers.items():
        kinds.setdefault((layer.rpartition(".")[2], *(tuple(state[name].shape) for name in parts.values())), layer)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(state[name].shape, generator=generator).abs() if "magnitude" in part else
              torch.randn(state[name].shape, generator=generator)
              for layer in kinds.values() for part, name in layers[layer].items()}  # fmt: skip
    if not values:
        return
    adapter = _save_config(model, directory / "blocks")
    save_file(values, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    inner = model.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    planned = merge.plan(case.base, adapter, inner, case.vocabulary, case.tokens)
    entries = planned.entries(case.dtype)
    proved = expected.expected_model(case.base, adapter, case.empty_model(), case.vocabulary, case.tokens)
    for name in sorted(proved.updated - _inner_experts(planned.base)):
        block = next(iter(entries[name].blocks()))[:ROWS].to(entries[name].dtype)
        if not deviation.is_rounded(block, proved.tensors[name].rows(0, len(block)), block.dtype):
            raise UserError(f"cannot merge: the merge of {name} differs from its formula; {KEEP}")


def _inner_experts(base: BaseWeights) -> set[str]:
    """Return the tensors of all experts but the first and the last: there may be hundreds."""
    ends = {parameter: (0, shape[0] - 1) for parameter, shape in base.stacked.items()}
    return {name for name, part in base.slices.items() if part.expert not in ends[part.parameter]}


def _check_small_model(case: proof.Case, model: PeftModel, directory: Path) -> bool:
    """Merge and prove a random adapter on a small model of the architecture, as a run would. Returns whether it was this one."""
    base, merged = directory / "base", directory / "merged"
    config = AutoConfig.from_pretrained(case.base, **NO_CODE, **case.labels)
    config = miniature.small_config(config, longest=None)
    known = config.get_text_config().vocab_size
    vocabulary = Vocabulary(known + len(case.tokens), tuple(range(known, known + len(case.tokens))))
    small = miniature.build(case.auto, config)
    small.save_pretrained(base, save_original_format=not _stacked(case))
    settings, same = model.peft_config["default"], True
    try:
        adapted = _adapted(small, settings, vocabulary)
    except ValueError:  # the adapter names layers that the small model lacks
        log.info("a small model lacks layers that the adapter names: the merge is tried on all its linear layers instead")
        small, same = miniature.build(case.auto, config), False
        try:
            adapted = _adapted(small, replace(settings, **ALL_LINEAR), vocabulary)
        except ValueError as error:  # PEFT refuses all-linear for some layers of state-space models
            log.warning("the merge is not tried on a small model before the first step: %s", error)
            return False
    ids = probe_ids(vocabulary, known, reward=case.reward)
    with user_errors(
        f"{type(small).__name__} does not run under this adapter", "name other layers with peft.target_modules=[...]"
    ):
        values, routes = _randomised(adapted, ids, reward=case.reward)
    adapted.save_pretrained(str(directory / "adapter"), save_embedding_layers=False)
    merged.mkdir()
    trial = proof.Case(base, directory / "adapter", case.reward, case.dtype, vocabulary.size, vocabulary.new)
    merge.merge(trial.base, trial.adapter, merged, model=small, dtype=trial.dtype, vocabulary=trial.vocabulary,
                tokens=trial.tokens)  # fmt: skip
    live = ProbeOutputs(
        ids, values, lora.scales_of(adapted), rounding_unit(adapted, half=False), bit_sums_of(adapted), routes=routes
    )
    result = proof.prove(trial, merged, live)
    if not result.holds:
        raise UserError(f"cannot merge: tried on a small model of the same architecture, the merge fails: {result}; {KEEP}")
    return same


def _adapted(small: PreTrainedModel, settings: Any, vocabulary: Vocabulary) -> PeftModel:
    grow(small, vocabulary.size, vocabulary.new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of patterns for layers that a small model lacks
        return get_peft_model(small, deepcopy(settings)).eval()


def _stacked(case: proof.Case) -> bool:
    """Whether the base's files hold a mixture's experts stacked, as the model does."""
    weights = BaseWeights(case.base, case.empty_model())
    return any(name in weights.locations for name in weights.stacked)


def _randomised(model: PeftModel, ids: Tensor, *, reward: RewardKind | None) -> tuple[Tensor, Routes]:
    """Move the trained parameters but lora_A at random, until the outputs change by about a tenth. Return outputs and routes."""
    settings: dict[str, Any] = {"temperature": 1.0, "reward": reward}
    generator = torch.Generator().manual_seed(0)
    start = {p: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad and ".lora_A." not in name}
    steps = {p: torch.randn(p.shape, generator=generator) * max(1e-3, value.std(correction=0).item() or 1.0)
             for p, value in start.items()}  # fmt: skip
    before, size = outputs_of(model, ids, **settings), 0.01
    values: Tensor = before
    routes: Routes = ()
    for _ in range(4):
        for parameter, value in start.items():
            parameter.data.copy_(value + size * steps[parameter])
        values, routes = outputs_and_routes(model, ids, **settings)
        moved = rms(values - before) / max(rms(before), 1e-9)
        if CHANGE / 2 <= moved <= 2 * CHANGE:
            break
        size *= CHANGE / max(moved, CHANGE / 1000)
    return values, routes


def _save_config(model: PeftModel, directory: Path) -> Path:
    directory.mkdir()
    model.peft_config["default"].save_pretrained(str(directory))
    return directory
