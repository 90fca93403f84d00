"""The end of a run tried before its beginning: its merge and the proof of it, without the base's weights and without training.

What a merge stumbles over is names, shapes and formulas. Names and shapes are those of the base's own files and of the adapter
on the meta device. Formulas are tried on a block of each kind of layer, and the whole, proof included, on a small model of the
architecture under an adapter of the same settings, whose random factors move what the model says by a tenth: a run that
hardly trains would show no fault of them in the end.
"""

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

from halos.confined import NO_CODE
from halos.errors import UserError, user_errors
from halos.logps import miniature
from halos.logps.vocabulary import Vocabulary, grow
from halos.merge import expected, lora, merge, proof
from halos.merge.base_weights import Source
from halos.merge.lora import KEEP
from halos.merge.routing import Routes
from halos.merge.safetensors_io import write_hollow
from halos.merge.trained import Trained, chosen_by, content_of, probe, said_by, typical, unit_of

log = logging.getLogger(__name__)

MOVED = 0.1  # by the probe adapter, of the typical log-prob or score
EVERYWHERE: dict[str, Any] = {
    "target_modules": "all-linear", "target_parameters": None, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip
ROWS = 64  # of each kind of layer that are merged


def rehearse(case: proof.Case, model: PeftModel) -> None:
    """Raises UserError where `model`, which may lie on the meta device, could not be merged, or its merge not be proved, in the
    end. Of `case` everything counts but the adapter, which is not there yet."""
    lora.refuse(model.peft_config["default"])
    with tempfile.TemporaryDirectory(prefix="halos-") as text:
        place = Path(text)
        _shapes(case, model, place)
        _blocks(case, model, place)
        _whole(case, model, place)


def _shapes(case: proof.Case, model: PeftModel, place: Path) -> None:
    """Every tensor of the merged model under its name, as the merge, the proof and from_pretrained have it."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    adapter = _saved(model, place / "shapes")
    write_hollow(adapter / "adapter_model.safetensors", {name: list(value.shape) for name, value in state.items()})
    inner = model.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    todo = merge.plan(case.base, adapter, inner, case.vocabulary, case.tokens)
    mine = {name: entry.shape for name, entry in todo.entries(case.dtype).items()}
    wanted = expected.truths(case.base, adapter, case.bare(), case.vocabulary, case.tokens).tensors
    theirs = {name: truth.shape for name, truth in wanted.items()}
    if other := sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)):
        raise UserError(
            f"cannot merge: {other[0]} would be {mine.get(other[0], 'absent')} and ought to be {theirs.get(other[0], 'absent')};"
            f" {KEEP}"
        )
    _loads(case, todo.config_of(inner, case.dtype), mine)


def _loads(case: proof.Case, config: Any, shapes: dict[str, list[int]]) -> None:
    """What from_pretrained makes of such tensors, of which none has a value."""
    state = {name: torch.empty(shape, dtype=case.dtype, device="meta") for name, shape in shapes.items()}
    kind: Any = type(case.bare())
    _, report = kind.from_pretrained(None, config=config, state_dict=state, device_map="meta", output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            names = ", ".join(sorted(map(str, report[what]))[:3])
            raise UserError(f"cannot merge: loading what is merged would find {what.replace('_', ' ')}: {names}; {KEEP}")


def _blocks(case: proof.Case, model: PeftModel, place: Path) -> None:
    """The first rows of one layer of each kind, merged from the base's own and from random factors."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    layers = merge.trained_by(model).updates
    kinds: dict[Any, str] = {}
    for layer, parts in layers.items():
        kinds.setdefault((layer.rpartition(".")[2], *(tuple(state[name].shape) for name in parts.values())), layer)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(state[name].shape, generator=generator).abs() if "magnitude" in part else
              torch.randn(state[name].shape, generator=generator)
              for layer in kinds.values() for part, name in layers[layer].items()}  # fmt: skip
    if not values:
        return
    adapter = _saved(model, place / "blocks")
    save_file(values, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    inner = model.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    todo = merge.plan(case.base, adapter, inner, case.vocabulary, case.tokens)
    entries = todo.entries(case.dtype)
    wanted = expected.truths(case.base, adapter, case.bare(), case.vocabulary, case.tokens)
    for name in sorted(wanted.updated - _inner_experts(todo.base)):
        block = next(iter(entries[name].blocks()))[:ROWS].to(entries[name].dtype)
        if not expected.is_rounded(block, wanted.tensors[name].rows(0, len(block)), block.dtype):
            raise UserError(f"cannot merge: the merge of {name} is not what its formula says; {KEEP}")


def _inner_experts(base: Source) -> set[str]:
    """Of experts that are a tensor each all but the first and the last: there may be hundreds."""
    ends = {whole: (0, shape[0] - 1) for whole, shape in base.stacked.items()}
    return {name for name, piece in base.pieces.items() if piece.expert not in ends[piece.whole]}


def _whole(case: proof.Case, model: PeftModel, place: Path) -> None:
    """A small model of the architecture under a probe adapter, merged and proved as a run would."""
    base, merged = place / "base", place / "merged"
    config = AutoConfig.from_pretrained(case.base, **NO_CODE, **case.labels)
    config = miniature.small_config(config, longest=None)
    known = config.get_text_config().vocab_size
    vocabulary = Vocabulary(known + len(case.tokens), tuple(range(known, known + len(case.tokens))))
    small = miniature.build(case.auto, config)
    small.save_pretrained(base, save_original_format=not _fused(case))
    settings: Any = model.peft_config["default"]
    try:
        adapted = _adapted(small, settings, vocabulary)
    except ValueError:  # it names layers that have been left out here
        log.info("a small model lacks layers that the adapter names: its merge is tried on all linear layers of that")
        small = miniature.build(case.auto, config)
        try:
            adapted = _adapted(small, replace(settings, **EVERYWHERE), vocabulary)
        except ValueError as error:  # PEFT takes some layers of state spaces only where they are not named by this
            log.warning("the merge is not tried on a small model before the first step: %s", error)
            return
    ids = probe(vocabulary, known, reward=case.reward)
    with user_errors(
        f"{type(small).__name__} does not run under this adapter", "name other layers with peft.target_modules=[...]"
    ):
        values, routes = _moved(adapted, ids, reward=case.reward)
    adapted.save_pretrained(str(place / "adapter"), save_embedding_layers=False)
    merged.mkdir()
    trial = proof.Case(base, place / "adapter", case.reward, case.dtype, vocabulary.size, vocabulary.new)
    merge.merge(trial.base, trial.adapter, merged, model=small, dtype=trial.dtype, vocabulary=trial.vocabulary,
                tokens=trial.tokens)  # fmt: skip
    live = Trained(ids, values, lora.scales_of(adapted), unit_of(adapted, half=False), content_of(adapted), routes=routes)
    result = proof.prove(trial, merged, live)
    if not result.holds:
        raise UserError(f"cannot merge: tried on a small model of the same architecture, the merge fails: {result}; {KEEP}")


def _adapted(small: PreTrainedModel, settings: Any, vocabulary: Vocabulary) -> PeftModel:
    grow(small, vocabulary.size, vocabulary.new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of patterns for layers that are not here
        return get_peft_model(small, deepcopy(settings)).eval()


def _fused(case: proof.Case) -> bool:
    """Whether the base's files hold a mixture's experts as memory does."""
    source = Source(case.base, case.bare())
    return any(name in source.where for name in source.stacked)


def _moved(model: PeftModel, ids: Tensor, *, reward: bool) -> tuple[Tensor, Routes]:
    """What the model says when everything that is trained has been moved at random, as far as moves that by a tenth; and where
    a mixture's tokens go then."""
    knobs: dict[str, Any] = {"temperature": 1.0, "reward": reward}
    generator = torch.Generator().manual_seed(0)
    start = {p: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad and ".lora_A." not in name}
    steps = {p: torch.randn(p.shape, generator=generator) * max(1e-3, value.std(correction=0).item() or 1.0)
             for p, value in start.items()}  # fmt: skip
    before, size = said_by(model, ids, **knobs), 0.01
    values: Tensor = before
    routes: Routes = ()
    for _ in range(4):
        for parameter, value in start.items():
            parameter.data.copy_(value + size * steps[parameter])
        values, routes = chosen_by(model, ids, **knobs)
        moved = typical(values - before) / max(typical(before), 1e-9)
        if MOVED / 2 <= moved <= 2 * MOVED:
            break
        size *= MOVED / max(moved, MOVED / 1000)
    return values, routes


def _saved(model: PeftModel, directory: Path) -> Path:
    directory.mkdir()
    model.peft_config["default"].save_pretrained(str(directory))
    return directory
