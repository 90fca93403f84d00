"""Right merges and wrong ones, drawn from a seed: what a proof has to tell apart.

A merge is wrong where some element is off the float64 merge by more than one rounding, or where the float64 merge is not of
what was trained: another scale, other rows for tokens, an adapter that is not the one of the model, other settings beside the
weights. Generator and faults were fixed before what the proof allows was.
"""

import json
import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from halos.checkpoint import lineage
from halos.checkpoint.weights import save_adapter
from halos.logps.model import LanguageModel
from halos.logps.vocabulary import Vocabulary, grow
from halos.merge import lora, merge, proof
from halos.merge.merge_and_prove import merge_and_prove
from halos.merge.probe import ProbeOutputs, probe_ids, probe_trained

WORDS = 300
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": WORDS, "max_position_embeddings": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2, "attention_bias": True, "embedding": "embed_tokens"},
    "Qwen2": {"num_key_value_heads": 2, "embedding": "embed_tokens"},
    "Gemma": {"num_key_value_heads": 2, "head_dim": 16, "embedding": "embed_tokens"},
    "Mistral": {"num_key_value_heads": 2, "embedding": "embed_tokens"},
    "Phi": {"embedding": "embed_tokens"},
    "GPT2": {"embedding": "wte"},
    "GPTNeoX": {"embedding": "embed_in"},
    "OPT": {"embedding": "embed_tokens", "word_embed_proj_dim": 64, "ffn_dim": 96, "do_layer_norm_before": True},
}
HALF = {"Llama", "Qwen2", "Gemma", "Mistral"}  # on a CPU torch's LayerNorm takes no float32 rows beside a bfloat16 weight
DTYPES = ["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Trial:
    """One merge: what was trained, what it says of itself, and what there is to prove."""

    seed: int
    case: proof.Case
    model: Any
    live: ProbeOutputs | None
    words: str  # what was drawn
    moved: float  # by the adapter, in the mean over log-probs

    @property
    def merged(self) -> Path:
        return self.case.adapter.parent / "merged"

    def prove(self) -> proof.Proof:
        return proof.prove(self.case, self.merged, self.live)


def draw(seed: int, place: Path, *, alone: bool = True) -> Trial:
    """A base, an adapter with random factors, and the model that they are together, as a run would hold it; `alone` says that
    some are merged from the disk, where no model is at hand."""
    dice = random.Random(seed)
    name, tied = dice.choice(list(FAMILIES)), dice.random() < 0.5
    settings = dict(FAMILIES[name])
    embedding, layers = settings.pop("embedding"), dice.choice([1, 2, 3])
    tied = tied and name != "Phi"
    base, base_dtype, dtype = place / "base", dice.choice(DTYPES), dice.choice(DTYPES)
    half = dice.random() < 0.3 and name in HALF
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**SIZES, **settings, num_hidden_layers=layers, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    spread = dice.choice([0.03, 0.1, 0.2])
    for parameter in model.parameters():
        parameter.data += spread * torch.randn(parameter.shape)
    model.to(getattr(torch, base_dtype)).save_pretrained(base, max_shard_size=dice.choice(["5GB", "60KB"]))
    _as_a_backbone(base, model.base_model_prefix, dice)
    vocabulary = new_tokens(dice)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if half else torch.float32)
    grow(model, vocabulary.size, vocabulary.new)
    chosen = _adapter(dice, model, embedding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **chosen))
    lora.pin_patterns(adapted)
    size = train(dice, adapted, seed)
    save_adapter(place / "adapter", adapted)
    (place / "merged").mkdir()
    ids = probe_ids(vocabulary, config.vocab_size, longest=SIZES["max_position_embeddings"])
    live, moved = said(adapted, ids, half=half)
    case = proof.Case(base, place / "adapter", None, getattr(torch, dtype), max(vocabulary.size, WORDS), vocabulary.new)
    words = f"{name} {layers} layers {'tied ' if tied else ''}{base_dtype}->{dtype} live {'bf16' if half else 'f32'} "
    words += f"{chosen} new {vocabulary.new} moved by {size:.0e}"
    return Trial(seed, case, adapted, None if alone and dice.random() < 0.15 else live, words, moved)


def _as_a_backbone(base: Path, prefix: str, dice: random.Random) -> None:
    path = base / "model.safetensors"
    if dice.random() < 0.15 and path.is_file():
        tensors = {name.removeprefix(f"{prefix}."): value for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


def new_tokens(dice: random.Random) -> Vocabulary:
    kind = dice.choice(["none", "none", "known", "grown", "padding"])
    if kind == "grown":
        return Vocabulary(WORDS + 3, (WORDS, WORDS + 2))
    return Vocabulary(WORDS - 5, (WORDS - 7, WORDS - 6) if kind == "padding" else ()) if kind != "none" else Vocabulary()


def _adapter(dice: random.Random, model: Any, embedding: str) -> dict[str, Any]:
    linear = sorted({name.rpartition(".")[2] for name, layer in model.named_modules()
                     if isinstance(layer, torch.nn.Linear | transformers.pytorch_utils.Conv1D)}
                    - {"lm_head", "embed_out"})  # fmt: skip
    head = next(name for name, layer in model.named_modules() if layer is model.get_output_embeddings())
    target = dice.choice(["all-linear", "all-linear", dice.sample(linear, min(2, len(linear))), [embedding, linear[0]], [head]])
    chosen: dict[str, Any] = {
        "r": dice.choice([1, 2, 4, 16]), "lora_alpha": dice.choice([1, 8, 32]), "target_modules": target,
        "use_rslora": dice.random() < 0.3, "use_dora": dice.random() < 0.25,
        "bias": dice.choice(["none", "none", "all", "lora_only"]),
    }  # fmt: skip
    if dice.random() < 0.3:
        some = dice.choice(linear)
        chosen["alpha_pattern"] = {f"0.*{some}": 64, some: 2, ".*": 5}
        chosen["rank_pattern"] = {some: 3}
    if dice.random() < 0.35:
        free = [each for each in (embedding, head) if each not in target] or [linear[-1]]
        chosen["modules_to_save"] = dice.choice([[free[0]], free])
    return chosen


def train(dice: random.Random, model: Any, seed: int) -> float:
    """Move what is trained: from hardly to far."""
    size = 10 ** dice.uniform(-4, -0.5)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() + size * torch.randn(parameter.shape, generator=generator)
    return size


def said(model: Any, ids: torch.Tensor, *, half: bool) -> tuple[ProbeOutputs, float]:
    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext()

    module = LanguageModel(model)
    live = probe_trained(module, model, ids, autocast=autocast, half=half, temperature=1.0)
    with model.disable_adapter():
        before = probe_trained(module, model, ids, autocast=autocast, half=half, temperature=1.0)
    return live, (live.values - before.values).abs().mean().item()


def right(trial: Trial) -> proof.Proof:
    return merge_and_prove(trial.case, trial.merged, lineage.hashes, model=trial.model.get_base_model(), live=trial.live)


# --- what goes wrong -------------------------------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]
Fault = Callable[[Trial, random.Random], Trial]


def in_the_files(change: Callable[[Tensors, Tensors, random.Random], None]) -> Fault:
    """A fault of the merged tensors, given those of the base under the same names."""

    def fault(trial: Trial, dice: random.Random) -> Trial:
        right(trial)
        (path,) = trial.merged.glob("*.safetensors")
        tensors, base = load_file(path), {}
        for file in trial.case.base.glob("*.safetensors"):
            base |= load_file(file)
        change(tensors, base, dice)
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})
        return trial

    fault.__name__ = change.__name__
    return fault


def moved_tensors(tensors: Tensors, base: Tensors) -> list[str]:
    """Matrices, and experts' stacks of them, that the merge changed."""
    return [name for name in sorted(tensors) if name in base and tensors[name].dim() > 1
            and tensors[name].shape == base[name].shape and not torch.equal(tensors[name].float(), base[name].float())] or [
                name for name in sorted(tensors) if tensors[name].dim() == 2]  # fmt: skip


def one_element_off_by_two_roundings(tensors: Tensors, base: Tensors, dice: random.Random) -> None:
    value = tensors[dice.choice(sorted(tensors))].view(-1)
    at = dice.randrange(len(value))
    value[at] += torch.finfo(value.dtype).eps * 2 * max(value[at].abs(), torch.tensor(1e-3, dtype=value.dtype))


def one_element_of_another_sign(tensors: Tensors, base: Tensors, dice: random.Random) -> None:
    value = tensors[dice.choice(moved_tensors(tensors, base))].view(-1)
    value[int(value.abs().argmax())] *= -1


def truncated_where_it_ought_to_be_rounded(tensors: Tensors, base: Tensors, dice: random.Random) -> None:
    value = tensors[dice.choice(moved_tensors(tensors, base))]
    value.copy_(torch.nextafter(value.float(), torch.zeros(())).to(value.dtype) if value.dtype is torch.float32 else
                value * (1 - torch.finfo(value.dtype).eps))  # fmt: skip


def rounded_to_less(tensors: Tensors, base: Tensors, dice: random.Random) -> None:
    names = [name for name in moved_tensors(tensors, base) if not torch.equal(_less(tensors[name]), tensors[name])]
    value = tensors[dice.choice(names or moved_tensors(tensors, base))]
    value.copy_(_less(value) if names else 0.99 * value)


def _less(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.float8_e4m3fn if value.dtype is torch.bfloat16 else torch.bfloat16).to(value.dtype)


def one_layer_scaled_by_a_thousandth_more(tensors: Tensors, base: Tensors, dice: random.Random) -> None:
    value = tensors[dice.choice(moved_tensors(tensors, base))]
    value.copy_((value.double() * (1.001 if value.dtype is torch.float32 else 1.02)).to(value.dtype))


def columns_swapped(tensors: Tensors, base: Tensors, dice: random.Random) -> None:
    value = tensors[dice.choice(moved_tensors(tensors, base))]
    value.copy_(value.roll(1, 1))


def rows_swapped(tensors: Tensors, base: Tensors, dice: random.Random) -> None:
    value = tensors[dice.choice(moved_tensors(tensors, base))]
    value.copy_(value.roll(1, 0))


def one_tensor_lost(tensors: Tensors, base: Tensors, dice: random.Random) -> None:
    del tensors[dice.choice(sorted(tensors))]


def two_layers_swapped(tensors: Tensors, base: Tensors, dice: random.Random) -> None:
    names = [(one, other) for one in sorted(tensors) for other in sorted(tensors)
             if one < other and tensors[one].shape == tensors[other].shape and tensors[one].dim() == 2]  # fmt: skip
    one, other = dice.choice(names)
    tensors[one], tensors[other] = tensors[other], tensors[one]


def not_a_number_somewhere(tensors: Tensors, base: Tensors, dice: random.Random) -> None:
    value = tensors[dice.choice(sorted(tensors))].view(-1)
    value[dice.randrange(len(value))] = float("nan")


def patched(target: Any, name: str, broken: Callable[[Any], Any]) -> Fault:
    """A fault of the merging code."""

    def fault(trial: Trial, _: random.Random) -> Trial:
        whole = getattr(target, name)
        setattr(target, name, broken(whole))
        try:
            case, model = trial.case, trial.model.get_base_model()
            merge.merge(case.base, case.adapter, trial.merged, model=model, dtype=case.dtype, vocabulary=case.vocabulary,
                        tokens=case.tokens)  # fmt: skip
        finally:
            setattr(target, name, whole)
        return trial

    fault.__name__ = f"{name}_{broken.__name__}"
    return fault


def doubled(scaling: Any) -> Any:
    return lambda *given: 2 * scaling(*given)


def by_the_root_of_the_rank(scaling: Any) -> Any:
    return lambda config, layer, rank: scaling(config, layer, rank) * (1.25 if rank == 1 else rank**0.5)


def subtracted(added: Any) -> Any:
    return lambda self, *given: added(replace(self, scaling=-self.scaling), *given)


def in_half_precision(added: Any) -> Any:
    return lambda self, *given: added(self, *given).to(torch.float8_e5m2).double()


def with_ranks_reversed(added: Any) -> Any:
    return lambda self, *given: added(replace(self, a=self.a.roll(1, 1)), *given)


def _beside(change: Callable[[Trial, random.Random], Trial | None]) -> Fault:
    """A fault of what a merge is made from, which merge and recomputation share: only the model itself can tell."""

    def fault(trial: Trial, dice: random.Random) -> Trial:
        assert trial.live is not None
        trial = change(trial, dice) or trial
        case = trial.case
        merge.merge(case.base, case.adapter, trial.merged, model=trial.model.get_base_model(), dtype=case.dtype,
                    vocabulary=case.vocabulary, tokens=case.tokens)  # fmt: skip
        return trial

    fault.__name__ = change.__name__
    return fault


def _settings(trial: Trial, **changes: Any) -> None:
    path = trial.case.adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def another_alpha_was_saved(trial: Trial, dice: random.Random) -> None:
    config = trial.model.peft_config["default"]
    _settings(trial, lora_alpha=config.lora_alpha * 3, alpha_pattern={})


def rslora_was_saved_the_other_way(trial: Trial, dice: random.Random) -> None:
    config = trial.model.peft_config["default"]
    if set(lora.scales_of(trial.model)) and config.r == 1 and not config.rank_pattern:
        return another_alpha_was_saved(trial, dice)  # of rank 1 both are one
    return _settings(trial, use_rslora=not config.use_rslora)


def one_factor_is_of_another_step(trial: Trial, dice: random.Random) -> None:
    path = trial.case.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = dice.choice([name for name in sorted(tensors) if "lora_" in name and "_B" in name])
    save_file({**tensors, name: -tensors[name]}, path, metadata={"format": "pt"})


def one_rank_saved_its_part_alone(trial: Trial, dice: random.Random) -> None:
    path = trial.case.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, value in tensors.items():
        if "lora_" in name and "_B" in name:
            value[len(value) // 2 :] = 0
    save_file(tensors, path, metadata={"format": "pt"})


def rows_of_known_tokens_are_taken_for_new(trial: Trial, dice: random.Random) -> Trial | None:
    if len(trial.model.peft_config["default"].modules_to_save or ()) > 1:
        return another_base(trial, dice)  # where both tables are trained whole no row is a new one's
    return replace(trial, case=replace(trial.case, tokens=tuple(sorted({*trial.case.tokens, WORDS - 6, WORDS - 9}))))


def another_base(trial: Trial, dice: random.Random) -> None:
    for path in trial.case.base.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({name: value * 1.3 if value.dim() == 2 else value for name, value in tensors.items()}, path,
                  metadata={"format": "pt"})  # fmt: skip


def another_setting(trial: Trial, dice: random.Random) -> Trial:
    right(trial)
    path = trial.merged / "config.json"
    config = json.loads(path.read_text())
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "hidden_act", "rope_parameters", "activation_function",
             "do_layer_norm_before", "num_attention_heads", "num_experts_per_tok", "norm_topk_prob",
             "routed_scaling_factor")  # fmt: skip
    name = dice.choice([each for each in names if each in config])
    wrong = {"hidden_act": "relu", "activation_function": "tanh", "do_layer_norm_before": False, "num_attention_heads": 2,
             "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "num_experts_per_tok": 4,
             "norm_topk_prob": not config.get("norm_topk_prob"), "routed_scaling_factor": 0.5}  # fmt: skip
    if config[name] == wrong.get(name):
        wrong[name] = "silu"
    path.write_text(json.dumps({**config, name: wrong.get(name, 0.01)}))
    return trial


OF_WHAT_IS_MERGED = [
    another_alpha_was_saved, rslora_was_saved_the_other_way, one_factor_is_of_another_step, one_rank_saved_its_part_alone,
    rows_of_known_tokens_are_taken_for_new, another_base,
]  # fmt: skip
BESIDE = {each.__name__ for each in OF_WHAT_IS_MERGED}
FAULTS: list[Fault] = [
    *map(in_the_files, [
        one_element_off_by_two_roundings, one_element_of_another_sign, truncated_where_it_ought_to_be_rounded, rounded_to_less,
        one_layer_scaled_by_a_thousandth_more, columns_swapped, rows_swapped, one_tensor_lost, two_layers_swapped,
        not_a_number_somewhere,
    ]),
    patched(merge, "scaling", doubled), patched(merge, "scaling", by_the_root_of_the_rank),
    patched(lora.Update, "added", subtracted), patched(lora.Update, "added", in_half_precision),
    patched(lora.Update, "added", with_ranks_reversed),
    *map(_beside, OF_WHAT_IS_MERGED),
    another_setting,
]  # fmt: skip
