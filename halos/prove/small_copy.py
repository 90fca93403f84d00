"""A small random copy of a run's model, whose forward is compared with transformers' own, one row at a time.

The expected values are computed here, row by row in float64 from the model's full logits, by none of the code that is proved.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from halos.data.collate import PackRow, pack
from halos.errors import UserError
from halos.examples import Completion
from halos.logps import miniature
from halos.logps.attention import SEGMENTS
from halos.logps.auto import CLASSES
from halos.logps.model import ActorCritic, LanguageModel, ModelWithHead, ProcessRewardModel, RewardModel, bare
from halos.logps.plan import plan_for, remember
from halos.models import adapter
from halos.reward_kind import RewardKind
from halos.types import Sequences

MARGIN, HALF_MARGIN = 16.0, 4.0  # times the distance of the model's own forward from itself in float64
FLOOR = 1e-5  # fraction of the largest value: float32
PERTURBATION = 0.5  # of trained parameters, relative to the scale of a freshly initialised matrix
ALL_LINEAR = {
    "target_modules": "all-linear",
    "target_parameters": [],
    "modules_to_save": [],
    "rank_pattern": {},
    "alpha_pattern": {},
}

# number of prompt tokens, and which tokens of the completion are scored: all, those of two turns, only the last one, all but one
SHAPES = ((4, "111111111"), (9, "1111000011111111"), (6, "00001"), (9, "101111111111"))
SAME_PROMPT = (1, 3)  # rows whose prompt is the same


@dataclass(frozen=True, slots=True)
class ForwardSpec:
    """Everything that a run's forward depends on, except weights and data."""

    config: PretrainedConfig
    peft: Mapping[str, Any] | None
    attention: str  # for packed rows
    reward: RewardKind | None
    valued: bool  # with a value head
    refers: bool  # the reference is the base with the adapter off
    longest: int | None
    dtype: torch.dtype
    autocast: bool  # computes in bfloat16
    device: torch.device
    temperature: float

    @property
    def half(self) -> bool:
        """Whether it computes in less than float32, whose rounding can hide an error of a tenth of a nat."""
        return self.autocast or self.dtype is not torch.float32

    def in_float32(self) -> "ForwardSpec":
        """The same forward in float32, for which flash attention has no kernels."""
        return replace(self, dtype=torch.float32, autocast=False, attention=SEGMENTS)


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: the error of what was compared, and the tolerance."""

    what: str
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed


class SmallCopy:
    """The copy, its trained parameters perturbed, inside the module that a run trains; and its unperturbed base."""

    def __init__(self, spec: ForwardSpec) -> None:
        self.spec, self.adapted = spec, ""  # describes its adapter, where it is not the run's
        self.plan = plan_for(spec.config, reward=spec.reward, attention=spec.attention, longest=spec.longest)
        self.base = self._build()
        self.rows = rows(self.base.config.get_text_config().pad_token_id if spec.reward is RewardKind.OUTCOME else None)
        copied = copy.deepcopy(self.base)
        remember(copied, self.plan)
        model: nn.Module = copied
        if spec.peft is not None:
            assert isinstance(model, PreTrainedModel)
            model = self._adapted(model, dict(spec.peft))
        if spec.reward:
            self.module: ModelWithHead = (RewardModel if spec.reward is RewardKind.OUTCOME else ProcessRewardModel)(model)
        else:
            self.module = (ActorCritic if spec.valued else LanguageModel)(model, temperature=spec.temperature)
        _perturb(self.module)
        self.module.to(spec.device).eval()
        self.model = bare(model)

    def _build(self) -> PreTrainedModel:
        auto = CLASSES[self.spec.reward]
        model = miniature.build(auto, miniature.small_config(self.spec.config, longest=self.spec.longest))
        if self.spec.reward and model.config.get_text_config().pad_token_id is None:
            model.config.get_text_config().pad_token_id = 0
        self.plain = str(model.config._attn_implementation)
        if self.plan.is_packed:
            model.set_attn_implementation(str(self.plan.attention))
        remember(model, self.plan)
        nn.Module.to(model, device=self.spec.device, dtype=self.spec.dtype)
        return model

    def _adapted(self, model: PreTrainedModel, settings: dict[str, Any]) -> nn.Module:
        """With the run's adapter, or one on every linear layer where the run's names layers that the copy does not have."""
        try:
            return adapter.attach(model, settings, base="", reward=self.spec.reward, seed=0)
        except (UserError, ValueError):
            self.adapted = "an adapter on every linear layer, since the run's names layers that the copy does not have"
            return adapter.attach(self._build(), {**settings, **ALL_LINEAR}, base="", reward=self.spec.reward, seed=0)

    def arithmetic(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.spec.device.type, torch.bfloat16) if self.spec.autocast else nullcontext()

    @torch.no_grad()
    def output(self, which: list[int] | None = None) -> Any:
        """Output of the module that is proved for some rows, in one batch."""
        with self.arithmetic():
            return self.module(self.packed(which))

    def packed(self, which: list[int] | None = None) -> Sequences:
        some = self.rows if which is None else [self.rows[number] for number in which]
        return pack(some, share=self.plan.shares).to(self.spec.device)

    def expected(self, model: PreTrainedModel, of: Callable[[PreTrainedModel, Tensor, int], Tensor], *, exact: bool) -> Tensor:
        """`of(model, ids (1, tokens), row number)` for every row, concatenated, with transformers' default attention: in float64
        with `exact`, else in the run's precision."""
        ids = [torch.from_numpy(np.concatenate([prompt, done.ids]).astype(np.int64))[None] for prompt, done in self.rows]
        model.set_attn_implementation(self.plain)
        try:
            used = _in_float64(model) if exact else model
            with torch.no_grad(), nullcontext() if exact else self.arithmetic():
                return torch.cat([of(used, row.to(self.spec.device), number).double() for number, row in enumerate(ids)])
        finally:
            if self.plan.is_packed:
                model.set_attn_implementation(str(self.plan.attention))


def rows(padding: int | None) -> list[PackRow]:
    """Rows of ordinary tokens, of which two have one prompt; for a reward model the last one ends in padding."""
    packed_rows = list[PackRow]()
    first, second = SAME_PROMPT
    for number, (prompt, scored) in enumerate(SHAPES):
        ids = miniature.row(prompt + len(scored), 50 + number).numpy().astype(np.int32)
        if number == second:
            ids[:prompt] = packed_rows[first][0]
        packed_rows.append((ids[:prompt], Completion(ids[prompt:], np.array([mark == "1" for mark in scored]))))
    if padding is not None:
        packed_rows[-1][1].ids[-2:] = padding
    return packed_rows


@torch.no_grad()
def _perturb(module: nn.Module) -> None:
    """Move every trained parameter away from its initial value: adapters, biases, a value head, modules_to_save."""
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        if parameter.requires_grad:
            bound = PERTURBATION * (3.0 / parameter.shape[-1]) ** 0.5 if parameter.dim() > 1 else 0.3
            parameter += (torch.rand(parameter.shape, generator=generator).to(parameter) * 2 - 1) * bound


@torch.no_grad()
def _in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that computes in float64, or in float32 where the architecture cannot."""
    twin = copy.deepcopy(model)
    try:
        if type(twin)._can_set_experts_implementation():
            twin.set_experts_implementation("eager")  # grouped matmuls have no float64 kernels
        twin.double()(input_ids=miniature.row(5).to(model.device)[None])
    except Exception:  # whatever an architecture raises
        return twin.float()
    return twin
