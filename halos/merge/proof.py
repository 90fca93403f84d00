"""A merge proves itself: every tensor on the disk, and the merged model, loaded as any user would, against what was trained."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from halos.confined import NO_CODE, SAFELY
from halos.errors import UserError, user_errors
from halos.logps.model import adapter_off
from halos.logps.vocabulary import Vocabulary, grow
from halos.merge import expected, trained
from halos.merge.routing import decisions, otherwise
from halos.merge.safetensors_io import SafeFile, blocks
from halos.merge.trained import Trained, bits, chosen_by, said_by, typical

FACTOR = 3.0  # times the model's own rounding noise; of the right merges that are drawn in the tests none is off by 1.7 of it
SINGLE = torch.finfo(torch.float32).eps
FEW = 6  # decisions of routers that may be others where noise changes none: of those merges none has more than 5 unaccounted
WORST = 5  # tensors named in the report
FREE = {"architectures", "dtype", "transformers_version", "num_labels", "id2label", "label2id", "problem_type", "pad_token_id",
        "use_cache", "vocab_size", "tie_word_embeddings", "quantization_config", "_name_or_path"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """What was merged from what, and how the trained model was built."""

    base: Path
    adapter: Path
    reward: bool
    dtype: torch.dtype
    vocabulary: int = 0  # ids that the trained model had, where they are more than the base's
    tokens: Sequence[int] = ()  # those of them that were new

    @property
    def auto(self) -> Any:
        return AutoModelForSequenceClassification if self.reward else AutoModelForCausalLM

    @property
    def labels(self) -> dict[str, int]:
        return {"num_labels": 1} if self.reward else {}

    def bare(self) -> PreTrainedModel:
        """The base's structure, without weights."""
        with user_errors(f"{self.base}/config.json makes no model"), torch.device("meta"):
            config = AutoConfig.from_pretrained(self.base, **NO_CODE, **self.labels)
            return self.auto.from_config(config, **NO_CODE)


@dataclass(frozen=True, slots=True)
class Proof:
    """All that is wrong, and how far tensors and values are from the truth."""

    faults: list[str]
    tensors: list[expected.Found]  # the worst first
    error: float  # by `measure`
    tolerance: float
    measure: str

    @property
    def holds(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        if self.faults:
            more = f", and {len(self.faults) - 1} more" if len(self.faults) > 1 else ""
            return f"{self.faults[0]}{more}"
        return (
            f"{len(self.tensors)} tensors are what they must be, {self.measure} {self.error:.1e} (allowed {self.tolerance:.1e})"
        )

    def report(self) -> dict[str, Any]:
        worst = [
            {"name": each.name, "relative_error": _finite(each.error), "of_allowed": _finite(each.allowed)}
            for each in self.tensors[:WORST]
        ]
        logits = {"measure": self.measure, "error": _finite(self.error), "tolerance": _finite(self.tolerance)}
        return {"holds": self.holds, "faults": self.faults, "logits": logits, "tensors": len(self.tensors), "worst": worst}


def _finite(value: float) -> float | None:
    """JSON has no nan and no infinity."""
    return value if math.isfinite(value) else None


# --- the three parts -------------------------------------------------------------------------------------------------


def prove(case: Case, merged: Path, live: Trained | None = None) -> Proof:
    """Whether `merged` is the trained model: files and tensors, then configuration and keys, then log-probs or scores.

    `live` is what the trained model itself said. Where it is not at hand, or computed in half precision, base and adapter are
    loaded as PEFT does it too, one model after the other, never two at once.
    """
    try:
        wanted = expected.truths(case.base, case.adapter, case.bare(), case.vocabulary, case.tokens)
        tensors, faults = expected.compare(merged, wanted.tensors, case.dtype)
        faults += _of_config(case, merged, tied=wanted.tied)
        faults += _of_scales(wanted.scales, live.scales) if live else []
        faults += _of_content(case.adapter, live.content) if live and live.content is not None else []
    except UserError as error:
        tensors, faults = [], [str(error)]
    if faults:
        return Proof(faults, tensors, math.nan, math.nan, "log-probs not compared")
    ids = live.ids if live else _probe(case, merged)
    plain = live is not None and live.unit <= SINGLE and live.without is None and case.dtype is torch.float32
    stored = None if plain else _stored(case, ids, live)
    comparisons, faults = _compared(case, merged, live, stored)
    worst = max(comparisons, key=lambda each: each.share)
    faults += [str(each) for each in comparisons if not each.holds]
    return Proof(faults, tensors, worst.error, worst.tolerance, worst.measure)


def _of_config(case: Case, merged: Path, *, tied: bool) -> list[str]:
    """Settings of the merged model that are not the base's, other than those that a merge may move."""
    base, made = (AutoConfig.from_pretrained(path, **NO_CODE, **case.labels) for path in (case.base, merged))
    was, now = _settled(base.to_dict()), _settled(made.to_dict())
    names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    faults = [f"config.json: {name} is {now.get(name)!r} and the base's is {was.get(name)!r}" for name in names]
    size, have = max(base.get_text_config().vocab_size, case.vocabulary), made.get_text_config().vocab_size
    if have != size:
        faults.append(f"config.json: vocab_size is {have} instead of {size}")
    if (ties := bool(getattr(made, "tie_word_embeddings", False))) != tied and not case.reward:
        faults.append(f"config.json: tie_word_embeddings is {ties} instead of {tied}")
    return faults


def _settled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a merge leaves alone, in nested configurations too."""
    return {
        name: _settled(value) if isinstance(value, Mapping) else value for name, value in settings.items() if name not in FREE
    }


def _of_scales(saved: Mapping[str, float], used: Mapping[str, float]) -> list[str]:
    """Layers whose saved adapter says another scale than the one that they were trained with."""
    return [f"{layer} was trained with a scale of {used.get(layer)} and is saved with {saved.get(layer)}"
            for layer in sorted(saved.keys() | used.keys())
            if not math.isclose(saved.get(layer, math.nan), used.get(layer, math.nan), rel_tol=1e-9)]  # fmt: skip


def _of_content(adapter: Path, content: Collection[int]) -> list[str]:
    """Tensors that were saved otherwise than the model has them."""
    file, wrap = SafeFile(adapter / "adapter_model.safetensors"), 2**64
    sums = {name: sum(map(bits, blocks(file, name))) % wrap for name in file.names if ".original_module." not in name}
    trained_with = {number % wrap for number in content}
    faults = [
        f"{name} of the adapter is not as the trained model has it" for name, each in sums.items() if each not in trained_with
    ]
    lost = len(trained_with - set(sums.values()))
    return faults or ([f"{lost} tensors that were trained are not in the adapter"] if lost else [])


# --- what it computes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    """The merged model's values against those of one witness."""

    measure: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance

    @property
    def share(self) -> float:
        """Of what is allowed; nan, which is wrong, counts as the most."""
        share = self.error / (self.tolerance or math.ulp(0.0))
        return share if share == share else math.inf

    def __str__(self) -> str:
        return f"{self.measure} {self.error:.1e}, allowed {self.tolerance:.1e}"


def _probe(case: Case, merged: Path) -> Tensor:
    text = AutoConfig.from_pretrained(merged, **NO_CODE).get_text_config()
    vocabulary = Vocabulary(case.vocabulary, tuple(case.tokens))
    return trained.probe(vocabulary, text.vocab_size, longest=getattr(text, "max_position_embeddings", None), reward=case.reward)


def _stored(case: Case, ids: Tensor, live: Trained | None) -> Trained:
    """What base and adapter compute together in float32, both read from the disk by PEFT; along the routes of the trained
    model, where that is at hand."""
    model = case.auto.from_pretrained(case.base, dtype=torch.float32, **SAFELY, **case.labels)
    grow(model, case.vocabulary, case.tokens)
    adapted = PeftModel.from_pretrained(model, str(case.adapter)).eval()
    temperature = live.temperature if live else 1.0
    knobs: dict[str, Any] = {"temperature": temperature, "reward": case.reward, "routes": live.routes if live else ()}
    values, routes = chosen_by(adapted, ids, **knobs)
    with adapter_off(adapted):
        without = said_by(adapted, ids, **knobs)
    return Trained(ids, values, {}, SINGLE, temperature=temperature, without=without, routes=routes)


def _compared(case: Case, merged: Path, live: Trained | None, stored: Trained | None) -> tuple[list[Comparison], list[str]]:
    """The merged model, loaded by plain from_pretrained into float32, beside its witnesses; and wrong keys."""
    model, report = case.auto.from_pretrained(merged, dtype=torch.float32, output_loading_info=True, **SAFELY)
    faults = [f"from_pretrained finds {kind.replace('_', ' ')}: {', '.join(sorted(map(str, report[kind]))[:3])}"
              for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[kind]]  # fmt: skip
    first = live or stored
    assert first is not None
    knobs: dict[str, Any] = {"temperature": first.temperature, "reward": case.reward, "routes": first.routes}
    values, routes = chosen_by(model.eval(), first.ids, **knobs)
    here = Trained(first.ids, values, {}, SINGLE, routes=routes)
    kind, rounded = "scores" if case.reward else "log-probs", torch.finfo(case.dtype).eps
    count = decisions(first.routes)
    in_half = trained.detours_in_half(model, first.ids, **knobs) if count and live is not None and live.unit > SINGLE else 0.0

    def beside(what: str, one: Trained, other: Trained, *units: float) -> list[Comparison]:
        """Two right computations, of which each may be off by its roundings: what they say, and where they would go."""
        noise = trained.noise(model, first.ids, math.hypot(*units), **knobs)
        said = f"typical difference of {kind} {what}"
        found = [Comparison(said, typical(one.values - other.values), FACTOR * typical(noise.moved))]
        if count:
            usual = max(noise.detours, in_half if one is live or other is live else 0.0)
            allowed = FACTOR * usual + FEW / count
            found.append(Comparison(f"difference of routes {what}", otherwise(one.routes, other.routes), allowed))
        return found

    found = []
    if live is not None and live.without is None:
        found += beside("from the trained model", here, live, rounded, live.unit, SINGLE)
    if stored is not None:
        found += beside("from base and adapter as PEFT loads them", here, stored, rounded, SINGLE, SINGLE)
    if live is not None and stored is not None and live.without is None:
        found += beside("of the trained model from what was saved of it", live, stored, live.unit, SINGLE, SINGLE)
    elif live is not None and stored is not None:
        found.append(_quantised(live, stored))
    return found, faults


def _quantised(live: Trained, stored: Trained) -> Comparison:
    """A model on a quantised base is not the one on the disk: what its adapter adds is compared, within what quantising moves."""
    assert live.without is not None
    assert stored.without is not None
    error = typical((live.values - live.without) - (stored.values - stored.without))
    return Comparison("typical difference of what the adapter adds", error, FACTOR * typical(live.without - stored.without))


def write_report(path: Path, proof: Proof, facts: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**proof.report(), **facts}, indent=1))
