"""The modes of a model: training or evaluation, with its adapter or as its base; its parts are found once, not at every switch.

A model with an adapter has thousands of modules, and a walk over them takes milliseconds, several times a micro-batch.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from halos.logps.model import ModelWithHead
from halos.logps.reference_values import with_values

_registered = 0  # modules that became a part of another, anywhere in this process, since the first Modes


def _count(*_: Any) -> None:
    global _registered
    _registered += 1


@cache
def _listen() -> None:
    register_module_module_registration_hook(_count)


class Modes:
    """Switches a model between its modes, by the modules that it has now."""

    def __init__(self, model: nn.Module) -> None:
        _listen()
        self.model, self._made_at = model, _registered
        self._parts = list(model.modules())
        self._values = list(map(vars, self._parts))  # attributes are set here: their own setters take ten times as long
        self._adapted: list[Any] = [part for part in self._parts if hasattr(part, "_disable_adapters")]
        self._wrappers = [part for part in self._parts if isinstance(part, ModelWithHead)]
        self._is_plain = all(map(_has_plain_train, self._parts))

    @property
    def is_current(self) -> bool:
        """Whether the model cannot have got another module since, as hooks may give it one."""
        return self._made_at == _registered

    def train(self, mode: bool = True) -> None:
        """Do as `nn.Module.train`."""
        if not self._is_plain:
            self.model.train(mode)
            return
        for values in self._values:
            values["training"] = mode

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, and afterwards the mode of the model before."""
        before = self.model.training
        self.train(False)
        try:
            yield
        finally:
            self.train(before)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The base model without its adapter, the base's own trained parameters (biases) back at the base's values.

        Only a flag of each layer and those values change: no requires_grad, and no copy of the model.
        """
        before = [layer._disable_adapters for layer in self._adapted]
        for layer in self._adapted:
            vars(layer)["_disable_adapters"] = True
        try:
            with ExitStack() as stack:
                for wrapper in self._wrappers:
                    self._set_values(stack, wrapper, wrapper.base_values)
                yield
        finally:
            for layer, was in zip(self._adapted, before, strict=True):
                vars(layer)["_disable_adapters"] = was

    @contextmanager
    def own_reference(self) -> Iterator[None]:
        """The policy as its own reference: the base, or the base with the adapter that it has in `reference_values`."""
        with ExitStack() as stack:
            if not any(wrapper.reference_values for wrapper in self._wrappers):
                stack.enter_context(self.adapter_off())
            for wrapper in self._wrappers:
                self._set_values(stack, wrapper, wrapper.reference_values)
            yield

    def _set_values(self, stack: ExitStack, wrapper: ModelWithHead, values: dict[str, Tensor]) -> None:
        """Set parameters until the stack closes; layers that were gathered are gathered again, before and after."""
        if not values:
            return
        stack.callback(wrapper.layout.reshard, self.model)
        stack.enter_context(with_values(wrapper, values, wrapper.layout))
        wrapper.layout.reshard(self.model)


def _has_plain_train(part: nn.Module) -> bool:
    """Whether `part.train` does no more than set its flag, and its children's: transformers' also replaces kernels, if it has."""
    own = type(part).train
    is_plain = own is nn.Module.train or (own is PreTrainedModel.train and not part.use_kernels)
    return is_plain and "training" in vars(part) and "train" not in vars(part)


def adapter_off(model: nn.Module) -> AbstractContextManager[None]:
    """`Modes.adapter_off`, of a model that is switched once."""
    return Modes(model).adapter_off()
