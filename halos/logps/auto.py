"""The class of transformers that loads a model, by what it gives: log-probs, or the scores of a reward model."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from halos.reward_kind import RewardKind

CLASSES: dict[RewardKind | None, Any] = {
    None: AutoModelForCausalLM,
    RewardKind.OUTCOME: AutoModelForSequenceClassification,
    RewardKind.PROCESS: AutoModelForTokenClassification,
}
