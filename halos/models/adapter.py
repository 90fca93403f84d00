"""Attach, check and load LoRA adapters (PEFT's, with PEFT's keys)."""

import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import transpose
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halos import confined
from halos.config.suggest import nearest
from halos.distributed.device import seed_all
from halos.errors import UserError, user_errors
from halos.logps.linear_head import HALVES
from halos.logps.reference_values import remember_base_values
from halos.merge import lora
from halos.models import targets
from halos.reward_kind import RewardKind

KEYS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "modules_to_save", "target_parameters",
)  # fmt: skip
LISTS = ("target_modules", "modules_to_save", "target_parameters")  # compared without regard to order


def attach(model: PreTrainedModel, settings: dict[str, Any], *, base: str, reward: RewardKind | None, seed: int) -> PeftModel:
    """Add a fresh adapter to the model (B = 0: its outputs are unchanged). A reward model's head is trained and saved whole."""
    task = TaskType(reward.task) if reward else TaskType.CAUSAL_LM
    # of sequence classifiers alone PEFT's all-linear leaves the head out
    excluded = "score|classifier" if reward is RewardKind.PROCESS else None
    config = LoraConfig(task_type=task, exclude_modules=excluded, **_peft_settings(model, settings))
    _refuse_unmatched_modules(model, settings["modules_to_save"])
    model.config._name_or_path = base
    own = {id(parameter) for parameter in model.parameters()}
    seed_all(seed)
    try:
        # there is nothing to initialise on the meta device
        adapted = get_peft_model(model, config, low_cpu_mem_usage=model.device.type == "meta")
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(f"peft: {error} The linear layers of this model are: {', '.join(linear)}") from error
    _share_configuration(adapted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # a head that is trained whole has the base's dtype; its updates would vanish in bfloat16
            parameter.data = parameter.data.float()
    for norm in [module for module in adapted.modules() if isinstance(module, nn.LayerNorm)]:
        if len({each.dtype for each in norm.parameters()}) > 1:  # bias=all: torch computes with both in one dtype
            norm.float()
    _set_magnitudes(adapted)
    _keep_dtypes(adapted)
    lora.refuse_unmatched_patterns(adapted, settings)
    lora.pin_patterns(adapted)
    remember_base_values(adapted, own)
    return adapted


def _set_magnitudes(model: PeftModel) -> None:
    """Set DoRA's magnitudes, which PEFT rounds to a half-precision base's dtype, to the norms that a forward pass divides by."""
    for layer in [each for each in model.modules() if isinstance(each, LoraLayer)]:
        for vector in layer.lora_magnitude_vector.values():
            base: Any = layer.get_base_layer()
            if type(vector) is DoraLinearLayer and type(base) in (nn.Linear, Conv1D) and base.weight.dtype in HALVES:
                rows = transpose(base.weight.data.float(), vector.fan_in_fan_out)
                vector.weight.data = torch.linalg.norm(rows, dim=1)


def _keep_dtypes(model: PeftModel) -> None:
    """Let embeddings and norms that are trained whole, in float32, return the base's dtype: what follows them would else compute
    in another than the reference and the merged model do. Linear layers do under autocast."""
    for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
        if not isinstance(wrapper.original_module, nn.Linear):
            wrapper.register_forward_hook(_in_dtype_of_base)


def _in_dtype_of_base(wrapper: Any, inputs: Any, output: Any) -> Any:
    dtype, own = next((each.dtype for each in wrapper.original_module.parameters()), None), wrapper.original_module
    if isinstance(own, nn.LayerNorm | nn.RMSNorm) and isinstance(output, Tensor) and torch.is_autocast_enabled("cuda"):
        return output  # on a GPU autocast computes the base's own in float32 too
    return output.to(dtype) if dtype in HALVES and isinstance(output, Tensor) and output.is_floating_point() else output


def _share_configuration(model: PeftModel) -> None:
    """Give the copies of fully trained layers the model's own config object, as the originals have: a later change of its
    attention must reach them too."""
    for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
        for copied in wrapper.modules_to_save.values():
            for name, module in copied.named_modules():
                if isinstance(getattr(module, "config", None), PretrainedConfig):
                    module.config = wrapper.original_module.get_submodule(name).config


def _peft_settings(model: PreTrainedModel, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings for PEFT, target names resolved to what they match. Raises UserError for what PEFT cannot adapt."""
    chosen = targets.resolve(model, settings["target_modules"], settings["target_parameters"])
    named = {name: settings[name] for name in KEYS}
    named |= {"target_modules": chosen.modules, "target_parameters": chosen.parameters or None}
    for key in ("rank_pattern", "alpha_pattern") if chosen.by_weight else ():
        named[key] = {end: value for name, value in settings[key].items() for end in (name, rf"({name})\.weight")}
    what = ", ".join(sorted({name.rpartition(".")[2] for name in chosen.by_weight}))
    for key in ("lora_dropout", "use_dora") if chosen.by_weight else ():
        if settings[key]:
            raise UserError(
                f"peft.{key}={settings[key]}: PEFT adapts {what} of {type(model).__name__} by their weights, where it has neither"
                f" dropout nor DoRA. Leave {key} out, or name other layers with peft.target_modules=[...]"
            )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() and any(name == end or name.endswith(f".{end}") for end in chosen.parameters):
            raise UserError(f"peft.target_parameters: {name} is quantised, and PEFT cannot adapt a quantised parameter")
    return named


def _refuse_unmatched_modules(model: PreTrainedModel, wanted: list[str]) -> None:
    """Raises UserError for a name in peft.modules_to_save that no module has: PEFT ignores it silently."""
    names = [name for name, _ in model.named_modules()]
    for end in wanted:
        if not any(name == end or name.endswith(f".{end}") for name in names):
            near = nearest(end, sorted({name.rpartition(".")[2] for name in names} - {""}))
            meant = f"; did you mean {near}?" if near else ""
            raise UserError(f"peft.modules_to_save: {type(model).__name__} has no module {end!r}{meant}")


def refuse_different_settings(model: PeftModel, directory: Path) -> None:
    """Raises UserError where a saved adapter has other settings than the model's own: its weights would mean other things."""
    path = directory / "adapter_config.json"
    if not path.is_file() or not (directory / "adapter_model.safetensors").is_file():
        raise UserError(f"peft.init_from={directory} is no adapter: it lacks {path.name} or adapter_model.safetensors")
    saved, own = confined.load_object(path), model.peft_config["default"].to_dict()
    for name in KEYS:
        if name.endswith("_pattern"):
            continue  # compared per layer, when the weights are loaded
        one, other = saved.get(name), own.get(name)
        if sorted(one or []) != sorted(other or []) if name in LISTS else one != other:
            raise UserError(
                f"peft.init_from={directory} was trained with peft.{name}={one}, and this run has {other}: set the same"
            )


def refuse_different_tensors(model: PeftModel, directory: Path) -> None:
    """Raises UserError where a saved adapter's tensors differ from the model's own in name or shape; reads only the header."""
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        saved = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  it is not a mapping
    own = {name: list(value.shape) for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    if other := sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name)):
        shapes = [str(each.get(other[0], "absent")) for each in (saved, own)]
        raise UserError(
            f"{directory} is not an adapter of {_base(model)}: {len(other)} tensors differ, such as {other[0]}, {shapes[0]}"
            f" instead of {shapes[1]}"
        )


def load_adapter(model: PeftModel, directory: Path) -> None:
    """Load saved weights into the model's adapter. Raises UserError where they belong to another model or another scaling."""
    _refuse_different_scales(model, directory)
    with user_errors(f"{directory / 'adapter_model.safetensors'} cannot be read"):
        weights = load_file(directory / "adapter_model.safetensors")
    try:
        result = set_peft_model_state_dict(model, weights)
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{directory} is not an adapter of {_base(model)}: {_shape_mismatch(model, weights) or error}") from error
    missing = [name for name in result.missing_keys if "lora_" in name or "modules_to_save" in name]
    if missing or result.unexpected_keys:
        example = (missing + result.unexpected_keys)[0]
        counts = f"{len(missing)} tensors are missing from it and {len(result.unexpected_keys)} are unexpected"
        raise UserError(f"{directory} is not an adapter of {_base(model)}: {counts}, such as {example}")


def _refuse_different_scales(model: PeftModel, directory: Path) -> None:
    saved = LoraConfig.from_pretrained(str(directory))
    assert isinstance(saved, LoraConfig)
    for layer, module in lora.layers_of(model).items():
        mine = float(module.scaling["default"])
        theirs = lora.scaling(saved, layer, module.r["default"])
        if not math.isclose(mine, theirs, rel_tol=1e-9):
            raise UserError(
                f"{directory} scales its update of {layer} by {theirs:g}, and this run by {mine:g}: set the"
                " peft.lora_alpha, alpha_pattern and use_rslora that it was trained with"
            )


def _base(model: PeftModel) -> str:
    return f"this run's model, {model.peft_config['default'].base_model_name_or_path}"


def _shape_mismatch(model: PeftModel, weights: dict[str, Tensor]) -> str | None:
    """Describe the first tensor whose shape is not the model's; None where all shapes match."""
    mine = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, value in weights.items():
        if name in mine and mine[name].shape != value.shape:
            return f"{name} is {list(value.shape)} instead of {list(mine[name].shape)}"
    return None
