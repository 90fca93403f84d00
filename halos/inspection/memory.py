"""The memory of a training step at its peak, by part."""

from collections.abc import Sequence
from dataclasses import dataclass

from halos.checkpoint.manifest import human_size
from halos.inspection.facts import Fact

BEFOREHAND = "log-probs beforehand"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device. Parts that a step does not hold at once do not add up to its peak."""

    libraries: int  # of the process before it loads a model; 0 on a GPU
    weights: int
    optimizer: int
    reference: int  # a second model
    gradients: int
    activations: int  # of the largest micro-batch, kept for its backward pass
    working: int  # of one layer
    head: int  # logits and what else the head makes of them
    accumulates: bool  # a batch has several micro-batches, so that all gradients exist from the second on
    stepping: int  # what the optimizer makes besides its state
    heap: int = 0  # what the C library's allocator keeps free between the blocks that a step allocates and frees; 0 on a GPU
    beforehand: int = 0  # what the pass over the reference's log-probs makes, before there are gradients and optimizer state

    @property
    def peak(self) -> int:
        """At the beginning of a backward pass, while the optimizer steps, or in the pass before the first step."""
        return max(self.of_step, self.of_pass)

    @property
    def of_step(self) -> int:
        backward = self.activations + self.working + self.head + (self.gradients if self.accumulates else 0)
        return self._held + self.optimizer + self.reference + self.heap + max(backward, self.gradients + self.stepping)

    @property
    def of_pass(self) -> int:
        """The pass over the reference's log-probs before the first step, which holds no gradients and no optimizer state."""
        return self._held + self.beforehand if self.beforehand else 0

    @property
    def _held(self) -> int:
        return self.libraries + self.weights

    def line(self) -> str:
        """Format as `about 3.1 GiB at the peak: weights 513.1 MiB, gradients 513.1 MiB, ...`, of a step; where a pass over the
        reference comes first, it has a size of its own, since the two are never held at once."""
        parts = ", ".join(f"{name} {human_size(size)}" for name, size, _ in self._parts() if name != BEFOREHAND)
        if not self.beforehand:
            return f"about {human_size(self.peak)} at the peak: {parts}"
        before = f"{human_size(self.of_pass)} before the first step, in the pass over the reference"
        return f"about {human_size(self.peak)} at the peak: {before}; {human_size(self.of_step)} in a step: {parts}"

    def facts(self) -> tuple[Fact, ...]:
        rows = [Fact(name, human_size(size), note) for name, size, note in self._parts()]
        return (
            Fact("at the peak", human_size(self.peak), "in a backward pass, while the optimizer steps, or before the first step"),
            *rows,
        )

    def _parts(self) -> Sequence[tuple[str, int, str]]:
        both = "all exist while later micro-batches are computed" if self.accumulates else "while the optimizer steps"
        parts = [
            ("weights", self.weights, ""),
            ("gradients", self.gradients, both),
            ("optimizer", self.optimizer, "its state"),
            ("reference", self.reference, "a second model"),
            ("activations", self.activations + self.working, "of the largest micro-batch"),
            ("logits", self.head, "a chunk of them, and the gradient of the head's weight"),
            ("heap", self.heap, "what the C library keeps free between its blocks"),
            (BEFOREHAND, self.beforehand, "the pass over the reference, before the first step"),
            ("libraries", self.libraries, "of the process, as now"),
        ]
        return [part for part in parts if part[1]]
