"""The kinds of reward models: of a whole completion, or of each of its steps."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

SAYS_GOOD = frozenset({"good", "right", "correct", "positive", "true", "yes", "+"})
SAYS_BAD = frozenset({"bad", "wrong", "incorrect", "negative", "false", "no", "-"})


class RewardKind(Enum):
    """The value is how the head is named in `LossInput.head`."""

    OUTCOME = "score"  # one score of a completion, read at its last token
    PROCESS = "steps"  # two logits at the end of each step: of a bad one, of a good one

    @staticmethod
    def of(head: str) -> "RewardKind | None":
        """Return the kind whose head has this name; None for a language model, with or without a value head."""
        return next((kind for kind in RewardKind if kind.value == head), None)

    @staticmethod
    def of_architectures(names: list[str] | None) -> "RewardKind | None":
        """Return the kind by the `architectures` of a model's config.json; None for a language model."""
        return next((kind for kind in RewardKind if any(kind.architecture in name for name in names or [])), None)

    @staticmethod
    def of_task(task: str | None) -> "RewardKind | None":
        """Return the kind by the task of an adapter in PEFT's settings; None for a language model."""
        return next((kind for kind in RewardKind if kind.task == task), None)

    @property
    def architecture(self) -> str:
        """The end of the names of transformers' classes."""
        return {"score": "ForSequenceClassification", "steps": "ForTokenClassification"}[self.value]

    @property
    def auto(self) -> str:
        """The name of transformers' class that loads such a model."""
        return f"AutoModel{self.architecture}"

    @property
    def labels(self) -> dict[str, Any]:
        """What from_pretrained is told of the head."""
        return {"num_labels": len(self.names) or 1}

    @property
    def names(self) -> tuple[str, ...]:
        """The labels in the order of the logits; none where there is a single score."""
        return {"score": (), "steps": ("bad", "good")}[self.value]

    def reverses(self, names: Mapping[int, str]) -> bool:
        """Whether a model's labels, by their numbers, say that the first logit is that of what is good."""
        first, second = (str(names.get(number, "")).lower() for number in (0, 1))
        return self is RewardKind.PROCESS and (first in SAYS_GOOD or second in SAYS_BAD)

    @property
    def task(self) -> str:
        """PEFT's name of the task."""
        return {"score": "SEQ_CLS", "steps": "TOKEN_CLS"}[self.value]

    @property
    def pipeline(self) -> str:
        """The hub's name of the task."""
        return {"score": "text-classification", "steps": "token-classification"}[self.value]
