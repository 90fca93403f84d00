"""Load the models of a run: policy or reward model, adapter, reference."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halos.checkpoint.weights import load_value_head, saved_model
from halos.config.arithmetic_version import ATTENTION_IN_ONE_CALL
from halos.config.bind import LossSpec
from halos.config.run_config import first_version
from halos.config.schema import Config
from halos.confined import expanded
from halos.distributed.strategy import Strategy
from halos.errors import UserError
from halos.logps.attention import SEGMENTS, VARLEN
from halos.logps.model import ActorCritic, LanguageModel, ModelWithHead, ProcessRewardModel, RewardModel, bare
from halos.logps.reference_values import remember_reference_values
from halos.logps.vocabulary import Vocabulary
from halos.models import adapter
from halos.models.load import attention, freeze, load_model, refuse_different_tokenizer, weights_dtype
from halos.models.locate import locate
from halos.reward_kind import RewardKind
from halos.rundir import RunDir

log = logging.getLogger(__name__)


class Machine(Protocol):
    """The device and precision that models are loaded for: an Accelerator, or a stand-in where nothing is trained."""

    @property
    def device(self) -> torch.device: ...

    @property
    def mixed_precision(self) -> str: ...

    @property
    def is_main_process(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class ModelLoader:
    """Load a run's models with the settings that they share."""

    config: Config
    base: Path
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary  # with the tokens that the base does not know
    stops: Sequence[int]  # the tokens that end an assistant's turn
    machine: Machine
    strategy: type[Strategy]  # that will distribute them

    @property
    def half(self) -> bool:
        """Return whether this run computes in bfloat16 on a GPU, so that frozen weights lose nothing by it."""
        return self.machine.device.type == "cuda" and self.machine.mixed_precision == "bf16"

    def load(
        self, source: Path, dtype: torch.dtype, *, reward: RewardKind | None, quantize: str | None = None, empty: bool = False
    ) -> PreTrainedModel:
        """Load a model with its weights; without them if it is to be `empty`, and on ranks but 0 if the strategy shards."""
        empty = empty or (self.strategy.is_sharded and not self.machine.is_main_process)
        return self._load(source, dtype, reward=reward, quantize=quantize, empty=empty)

    def load_structure(self, source: Path, dtype: torch.dtype, *, reward: RewardKind | None) -> PreTrainedModel:
        """Load a model without weights, on the meta device."""
        with torch.device("meta"):
            return self._load(source, dtype, reward=reward, quantize=None, empty=True)

    def _load(
        self, source: Path, dtype: torch.dtype, *, reward: RewardKind | None, quantize: str | None, empty: bool
    ) -> PreTrainedModel:  # fmt: skip
        return load_model(
            source,
            self.tokenizer,
            reward=reward,
            dtype=dtype,
            attention=self.attention(dtype),
            quantize=quantize,
            new_tokens=self.new_tokens(source),
            stops=self.stops,
            seed=self.config.seed,
            empty=empty,
            longest=self.config.train.max_length,
        )

    def new_tokens(self, source: Path) -> Sequence[int]:
        """The tokens whose rows of the tables start anew, in the model of this directory."""
        return self.vocabulary.new if source == self.base else ()

    def attention(self, dtype: torch.dtype) -> str:
        """The attention for packed sequences of a model with weights of this dtype."""
        half, name = dtype is torch.bfloat16 or self.machine.mixed_precision == "bf16", self.config.model.attention
        chosen = attention(name, half=half, device=self.machine.device)
        return SEGMENTS if name == "auto" and chosen == VARLEN and self._began_before(ATTENTION_IN_ONE_CALL) else chosen

    def _began_before(self, version: int) -> bool:
        """Return whether this is the resume of a run that an earlier version of the arithmetic began."""
        directory = RunDir(self.config.run_dir)
        return bool(self.config.resume) and first_version(directory.read_attempts(), str(directory.path)) < version

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the policy's weights, or of its frozen base's."""
        return weights_dtype(self.config.model.dtype, trained=self.config.peft.name == "none", half=self.half)

    @property
    def reference_dtype(self) -> torch.dtype:
        """The dtype of a reference model's weights."""
        return weights_dtype(self.config.model.dtype, trained=True, half=self.half)


def reference_is_adapter(config: Config) -> bool:
    """Return whether the reference is the base with the adapter that the run starts with: the policy's own start."""
    named, start = config.reference.name_or_path, config.peft.init_from
    return config.peft.name == "lora" and start is not None and named is None and config.reference.adapter == "start"


def load_policy(loader: ModelLoader, *, reward: RewardKind | None, refers: bool, checkpoint: Path | None) -> nn.Module:
    """Load the model to train, with its adapter, from `checkpoint` if the run resumes. `refers`: the loss uses a reference."""
    config = loader.config
    remembers = refers and (reference_is_adapter(config) or config.reference.sync_every is not None)
    lora = config.peft.name == "lora"
    dtype = loader.dtype
    source, sharded = saved_model(checkpoint) if checkpoint and not lora else (loader.base, False)
    model = loader.load(source, dtype, reward=reward, quantize=config.model.quantize, empty=sharded)
    if config.model.quantize:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(config.train.activation_checkpointing))
    if config.train.activation_checkpointing:
        checkpoint_activations(model)
    if not lora:
        return model
    adapted = adapter.attach(model, asdict(config.peft), base=str(loader.base), reward=reward, seed=config.seed)
    if config.peft.init_from is not None and (remembers or not checkpoint):
        adapter.load_adapter(adapted, Path(config.peft.init_from))
    if remembers:
        remember_reference_values(adapted)
    if checkpoint:
        adapter.load_adapter(adapted, checkpoint / "adapter")
    return adapted


def checkpoint_activations(model: nn.Module) -> None:
    """Let a model's layers keep their inputs alone, and compute the rest again in the backward pass."""
    bare(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def policy_structure(loader: ModelLoader, *, reward: RewardKind | None) -> nn.Module:
    """Return the policy with its adapter but without weights, on the meta device. Raises UserError where `load_policy` would,
    except for errors in the weights themselves."""
    config = loader.config
    if config.model.quantize and not loader.strategy.supports_quantised:
        raise UserError(f"model.quantize={config.model.quantize}: a quantised base cannot be sharded; launch with a DDP config")
    model = loader.load_structure(loader.base, loader.dtype, reward=reward)
    if config.peft.name == "none":
        return model.eval()
    adapted = adapter.attach(model, asdict(config.peft), base=str(loader.base), reward=reward, seed=config.seed)
    if config.peft.init_from is not None and not config.resume:
        adapter.refuse_different_settings(adapted, Path(config.peft.init_from))
        adapter.refuse_different_tensors(adapted, Path(config.peft.init_from))
    return adapted.eval()


def reference_structure(loader: ModelLoader, named: Path) -> nn.Module:
    """Return the configured reference model without weights, on the meta device."""
    return loader.load_structure(named, loader.reference_dtype, reward=None)


def locate_reference(loader: ModelLoader) -> Path | None:
    """Return the directory of the configured reference model, None if there is none. Raises UserError if its tokenizer differs
    from the policy's."""
    config = loader.config
    if config.reference.name_or_path is None:
        return None
    cache = expanded(config.cache_dir)
    directory = locate(config.reference.name_or_path, config.reference.revision, cache, key="reference.name_or_path")
    refuse_different_tokenizer(directory, loader.tokenizer, loader.vocabulary.new)
    return directory


def refuse_other_shape(model: nn.Module, reference: nn.Module) -> None:
    """Raises UserError where a reference that is to become the policy has other parameters than it."""
    mine, others = ({name: tuple(p.shape) for name, p in each.named_parameters()} for each in (model, reference))
    if other := next((name for name in (*mine, *others) if mine.get(name) != others.get(name)), None):
        raise UserError(
            f"reference.sync_every: the reference becomes the policy, and reference.name_or_path names another model: {other} is"
            f" {others.get(other, 'not there')}, the policy's {mine.get(other, 'not there')}"
        )


def load_reference(loader: ModelLoader, model: nn.Module, directory: Path | None, *, empty: bool = False) -> ModelWithHead | None:
    """Load the model in `directory`, or else a frozen copy of the policy's start; without weights if it is to be `empty`.

    None if the policy itself, with its trained tensors swapped for their initial values, is the reference: no second copy.
    """
    if directory is None and isinstance(model, PeftModel):
        return None
    inner = loader.load(directory or loader.base, loader.reference_dtype, reward=None, empty=empty)
    return freeze(LanguageModel(inner, temperature=loader.config.train.temperature))


def teach(reference: nn.Module | None, policy: nn.Module, candidates: int) -> None:
    """Let a reference say its likeliest ids for each token, so many `candidates`, among the policy's."""
    if candidates:
        assert isinstance(reference, LanguageModel), "a loss with candidates has a teacher"
        sizes = [int(bare(each).config.get_text_config().vocab_size) for each in (reference.model, policy)]
        reference.top, reference.below = candidates, min(sizes)


def add_head(loader: ModelLoader, model: nn.Module, loss: LossSpec, checkpoint: Path | None) -> ModelWithHead:
    """Wrap the model in the module that computes a loss's inputs. A value head is loaded from where the policy comes from."""
    if loss.reward:
        return (RewardModel if loss.reward is RewardKind.OUTCOME else ProcessRewardModel)(model)
    temperature = loader.config.train.temperature
    wrapped = (LanguageModel if loss.inputs.head == "language" else ActorCritic)(model, temperature=temperature)
    wrapped.token_statistics = loss.token_statistics
    if not isinstance(wrapped, ActorCritic):
        return wrapped
    adapter = Path(loader.config.peft.init_from).resolve() if loader.config.peft.init_from else None
    near_adapter = [adapter, adapter.parent] if adapter else []  # exported, or in a checkpoint
    for directory in (checkpoint,) if checkpoint else (*near_adapter, loader.base):
        if load_value_head(directory, wrapped.value_head):
            log.info("%-10s from %s", "value head", directory)
            break
    return wrapped
