"""Right merges of mixtures and wrong ones, drawn from a seed: what may happen to experts and routers, beside all that may
happen to any model."""

import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from merge_faults import DTYPES, SIZES, WORDS, Fault, Tensors, Trial, in_the_files, new_tokens, patched, said, train
from merge_faults import FAULTS as OF_ANY

from halos.checkpoint.weights import save_adapter
from halos.logps.vocabulary import grow
from halos.merge import proof
from halos.merge.experts import ExpertUpdates
from halos.merge.lora import Update
from halos.merge.probe import probe_ids
from halos.models import adapter

SMALL = SIZES | {"hidden_size": 32, "intermediate_size": 40}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 5, "num_key_value_heads": 2},
    "Qwen3Moe": {"num_experts": 6, "moe_intermediate_size": 24, "head_dim": 8, "norm_topk_prob": True, "num_key_value_heads": 2},
    "Olmoe": {"num_experts": 4, "num_key_value_heads": 2},
    "DeepseekV3": {"n_routed_experts": 8, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1, "q_lora_rank": 8,
                   "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
}  # fmt: skip
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def draw(seed: int, place: Path, *, alone: bool = True) -> Trial:
    """A mixture, an adapter of its experts with random factors, and the model that they are together, as a run would hold it."""
    dice = random.Random(seed)
    name, layers = dice.choice(list(FAMILIES)), dice.choice([1, 2, 3])
    base, base_dtype, dtype = place / "base", dice.choice(DTYPES), dice.choice(DTYPES)
    half, fused = dice.random() < 0.3, dice.random() < 0.25
    torch.manual_seed(seed)
    settings = {**SMALL, **FAMILIES[name], "num_hidden_layers": layers, "num_experts_per_tok": dice.choice([1, 2, 3])}
    if name == "DeepseekV3":
        settings["first_k_dense_replace"] = min(1, layers - 1)
    config = getattr(transformers, f"{name}Config")(**settings, tie_word_embeddings=dice.random() < 0.3)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    spread = dice.choice([0.03, 0.1, 0.2])
    for value in [*model.parameters(), *(each for at, each in model.named_buffers() if "correction" in at)]:
        value.data += spread * torch.randn(value.shape)
    model.to(getattr(torch, base_dtype)).save_pretrained(base, save_original_format=not fused)
    vocabulary = new_tokens(dice)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if half else torch.float32)
    grow(model, vocabulary.size, vocabulary.new)
    chosen = _adapter(dice)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = adapter.attach(model, chosen, base=str(base), reward=None, seed=seed)
    size = train(dice, adapted, seed)
    save_adapter(place / "adapter", adapted)
    (place / "merged").mkdir()
    live, moved = said(adapted, probe_ids(vocabulary, WORDS, longest=SIZES["max_position_embeddings"]), half=half)
    case = proof.Case(base, place / "adapter", None, getattr(torch, dtype), max(vocabulary.size, WORDS), vocabulary.new)
    words = f"{name} {layers} layers {base_dtype}->{dtype} live {'bf16' if half else 'f32'} {'fused ' if fused else ''}"
    words += f"{chosen} new {vocabulary.new} moved by {size:.0e}"
    return Trial(seed, case, adapted, None if alone and dice.random() < 0.15 else live, words, moved)


def _adapter(dice: random.Random) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "r": dice.choice([1, 2, 4, 16]), "lora_alpha": dice.choice([1, 8, 32]), "lora_dropout": 0.0, "use_dora": False,
        "target_modules": dice.choice(["all-linear", "all-linear", [], ["o_proj"]]),
        "target_parameters": dice.choice([BOTH, BOTH, BOTH[:1], BOTH[1:], [*BOTH, "mlp.gate.weight"]]),
        "use_rslora": dice.random() < 0.3, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [],
    }  # fmt: skip
    if dice.random() < 0.3:
        some = dice.choice([end for end in chosen["target_parameters"] if end in BOTH])
        chosen["alpha_pattern"], chosen["rank_pattern"] = {some: 5}, {some: 3}
    if dice.random() < 0.3:
        chosen["modules_to_save"] = dice.choice([["lm_head"], ["embed_tokens", "lm_head"], ["norm"]])
    return chosen


# --- what goes wrong -------------------------------------------------------------------------------------------------


def two_experts_swapped(tensors: Tensors, base: Tensors, dice: random.Random) -> None:
    """Of the first layer that has any."""
    first = next(name for name in sorted(tensors) if ".experts." in name)
    if tensors[first].dim() == 3:
        tensors[first] = tensors[first].roll(1, 0)
    else:
        other = first.replace(".experts.0.", ".experts.1.")
        tensors[first], tensors[other] = tensors[other], tensors[first]


def the_router_is_another(tensors: Tensors, base: Tensors, dice: random.Random) -> None:
    value = tensors[dice.choice([name for name in sorted(tensors) if name.endswith("gate.weight")])]
    value.copy_(value.roll(1, 0))


def the_router_is_rounded_to_less(tensors: Tensors, base: Tensors, dice: random.Random) -> None:
    names = [name for name in sorted(tensors) if name.endswith(("gate.weight", "correction_bias"))]
    value = tensors[dice.choice(names)]
    value.copy_(value.to(torch.float8_e4m3fn).to(value.dtype))


def without_the_second(of: Any) -> Any:
    """An expert whose update is dropped."""
    return lambda self, expert: replace(of(self, expert), scaling=0.0 if expert == 1 else self.scaling)


def of_the_next(of: Any) -> Any:
    """Updates go to other experts than their own."""
    return lambda self, expert: of(self, (expert + 1) % self.experts)


def with_its_halves_swapped(of: Any) -> Any:
    """What is the gate's goes to the up projection."""
    return lambda self, expert: replace(update := of(self, expert), b=torch.cat(update.b.chunk(2)[::-1]))


def with_another_scale_for_one(of: Any) -> Any:
    return lambda self, expert: replace(update := of(self, expert), scaling=update.scaling * (1.5 if expert == 2 else 1))


def with_columns_together(of: Any) -> Any:
    """B read as A is: an expert's part in one run."""

    def broken(self: ExpertUpdates, expert: int) -> Update:
        update = of(self, expert)
        rank = update.b.shape[1]
        return replace(update, b=self.b[:, expert * rank : (expert + 1) * rank].double() if rank > 1 else -update.b)

    return broken


def with_rows_apart(of: Any) -> Any:
    """A read as B is."""

    def broken(self: ExpertUpdates, expert: int) -> Update:
        update = of(self, expert)
        return replace(update, a=self.file.read(self.a)[expert :: self.experts].double() if len(update.a) > 1 else -update.a)

    return broken


FAULTS: list[Fault] = [
    *map(in_the_files, [two_experts_swapped, the_router_is_another, the_router_is_rounded_to_less]),
    *(patched(ExpertUpdates, "of", broken) for broken in (
        without_the_second, of_the_next, with_its_halves_swapped, with_another_scale_for_one, with_columns_together,
        with_rows_apart)),
]  # fmt: skip
EVERY = [*FAULTS, *OF_ANY]
