"""Scores of a reward model: batched, shortest samples first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from halos.checkpoint import integrity
from halos.checkpoint.lineage import identity
from halos.config.schema import Scorer as Settings
from halos.confined import SAFELY
from halos.data.collate import pack
from halos.data.template import chat_template
from halos.data.tokenize import Encoder
from halos.distributed.device import has_bfloat16
from halos.errors import UserError, user_errors
from halos.examples import Completion
from halos.logps.attention import SEGMENTS
from halos.logps.model import RewardModel as Scorer
from halos.logps.plan import plan_for, remember
from halos.models.load import load_tokenizer, load_weights, read_config, weights_dtype
from halos.rollout.ranks import local_device
from halos.rollout.types import Sample, Score
from halos.types import Demonstration


class RewardModel:
    """A sequence classifier with one label (ours, TRL's), or with several, of which `label` is the reward.

    HALOs' reward models have two labels and score with the second: label=1.
    """

    def __init__(self, directory: Path, settings: Settings, *, max_length: int | None, quiet: bool) -> None:
        """Raises UserError for a model that is no classifier, and for a label that it does not have."""
        integrity.check(directory, "reward model")
        config = read_config(directory)
        if not any("SequenceClassification" in name for name in config.architectures or []):
            raise UserError(
                f"{directory} is no reward model: its architecture is {', '.join(config.architectures or ['unknown'])}"
            )
        labels, label = int(config.num_labels or 1), settings.label
        if labels > 1 and label is None:
            raise UserError(f"{directory} has {labels} labels: say which one is the reward, online.scorer.label=1 for HALOs'")
        if label is not None and label >= labels:
            raise UserError(f"online.scorer.label={label}, but {directory} has {labels} labels, counted from 0")
        self.directory, self.label, self.batch_size, self.quiet = directory, label or 0, settings.batch_size, quiet
        self._loaded: Any = None
        self.tokenizer, _ = load_tokenizer(directory, add_tokens=[])
        self.tokenizer.chat_template = chat_template(self.tokenizer, None)
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(length for length in (max_length, limit, 2**31) if length)

    def name(self) -> str:
        return f"reward model {self.directory}"

    def request(self) -> dict[str, Any]:
        weights = identity(self.directory)
        template = hashlib.sha256(json.dumps(self.tokenizer.chat_template).encode()).hexdigest()[:16]
        return {"reward_model": weights, "label": self.label, "max_length": self.max_length, "template": template}

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Score]]:
        encoder = Encoder(self.tokenizer, max_length=self.max_length, truncation="drop")
        demonstrations = [(Demonstration(sample.prompt.turns, ({"role": "assistant", "content": sample.text},)), sample.prompt.id)
                for sample in samples]  # fmt: skip
        fitting = []
        for sample, encoded in zip(samples, encoder.encode(demonstrations), strict=True):
            if isinstance(encoded, str):
                yield sample, Score(None, encoded)
            else:
                whole = Completion(encoded.completions[0].ids, np.ones(len(encoded.completions[0].ids), bool))
                fitting.append((len(encoded.prompt) + len(whole.ids), (encoded.prompt, whole), sample))
        fitting.sort(key=lambda each: each[0])  # so that rows of one batch have similar lengths
        if not fitting:
            return
        model = self._loaded = self._loaded or self._load()
        for start in tqdm(range(0, len(fitting), self.batch_size), desc="scoring", unit="batch", delay=2,
                          disable=True if self.quiet else None):  # fmt: skip
            some = fitting[start : start + self.batch_size]
            scores = model.scores(pack([pair for _, pair, _ in some]).to(model.model.device))[:, self.label].tolist()
            for (_, _, sample), value in zip(some, scores, strict=True):
                yield sample, Score(value)

    def _load(self) -> Any:
        device = local_device()
        dtype = weights_dtype("auto", trained=False, half=has_bfloat16())
        plan = plan_for(read_config(self.directory), reward=True, attention=SEGMENTS)
        extra = {"dtype": dtype, "attn_implementation": plan.attention, **SAFELY}
        with user_errors(f"{self.directory} could not be loaded as a reward model"):
            model = load_weights(AutoModelForSequenceClassification, self.directory, extra)
        remember(model, plan)
        if model.config.get_text_config().pad_token_id is None:
            model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return Scorer(model.to(device).eval())
