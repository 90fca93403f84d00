"""Scores of a reward model: batched, shortest samples first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from halos.config.paths import check_model
from halos.config.schema import Scorer as Settings
from halos.confined import SAFELY, expanded
from halos.errors import UserError, user_errors
from halos.examples import Completion, Demonstration
from halos.reward_kind import RewardKind
from halos.rollout.ranks import local_device
from halos.rollout.scorers.scorer import Context, Option, Scorer
from halos.rollout.types import Sample, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RewardModel(Scorer):
    """A sequence classifier with one label (ours, TRL's), or with several, of which `label` is the reward.

    HALOs' reward models have two labels and score with the second: label=1.
    """

    option = Option("--reward-model", "a directory or hub id of a sequence classifier", key="model", metavar="DIR")
    takes = ("model", "label", "batch_size")
    loads_model = True
    paths = ("model",)
    addresses = ()
    recorded_since = ("tokenizer", "config.json")

    @classmethod
    def problem(cls, settings: Settings, spelled: Callable[[str], str]) -> str | None:
        return None if settings.model else f"{spelled('model')} is missing: its directory or hub id"

    @classmethod
    def content(cls, settings: Settings, *, cache: Path) -> dict[str, str | None]:
        """Hash the weights, and the tokenizer, the chat template and the config, which decide the scores of the same weights."""
        from halos.models.content_hashes import CONFIG, config_hashes, tokenizer_hashes
        from halos.models.locate import locate

        assert settings.model is not None
        directory = locate(settings.model, None, cache, key="online.scorer.model")
        beside = tokenizer_hashes("model", directory, _tokenizer(directory), cache) | config_hashes("model", directory, [CONFIG])
        return super().content(settings, cache=cache) | beside

    @classmethod
    def open(cls, settings: Settings, context: Context) -> RewardModel:
        from halos.models.locate import locate

        assert settings.model is not None
        check_model(settings.model, "online.scorer.model")
        directory = locate(settings.model, None, expanded(context.cache_dir), key="online.scorer.model")
        return cls(directory, settings, max_length=context.max_length, quiet=context.quiet, day=context.day)

    def __init__(
        self, directory: Path, settings: Settings, *, max_length: int | None, quiet: bool, day: date | None = None
    ) -> None:
        """Raises UserError for a model that is no classifier, and for a label that it does not have."""
        from halos.checkpoint import integrity
        from halos.data.dates import date_of
        from halos.models.load import read_config

        integrity.check(directory, "reward model")
        config = read_config(directory)
        kind = RewardKind.of_architectures(config.architectures)
        if kind is RewardKind.PROCESS:
            raise UserError(f"{directory} is a process reward model, which scores steps: give one that scores whole completions")
        if kind is not RewardKind.OUTCOME:
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
        self.tokenizer = _tokenizer(directory, day)
        self.date = date_of(self.tokenizer)
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(length for length in (max_length, limit, 2**31) if length)

    def name(self) -> str:
        return f"reward model {self.directory}"

    def request(self) -> dict[str, Any]:
        from halos.checkpoint.lineage import identity
        from halos.data.dates import without_date
        from halos.models.content_hashes import CONFIG, config_hashes, tokenizer_hashes

        template = hashlib.sha256(json.dumps(without_date(str(self.tokenizer.chat_template))).encode()).hexdigest()[:16]
        day = {} if self.date is None else {"date": self.date}
        tokenizer = tokenizer_hashes("model", self.directory, self.tokenizer)["model.tokenizer"]
        config = config_hashes("model", self.directory, [CONFIG])[f"model.{CONFIG}"]
        return {"reward_model": identity(self.directory), "label": self.label, "max_length": self.max_length,
                "template": template, **day, "tokenizer": tokenizer, CONFIG: config}  # fmt: skip

    def load(self) -> None:
        self._loaded = self._loaded or self._load()

    def score(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Score]]:
        fitting = []
        for sample, encoded in zip(samples, self._encoded(samples), strict=True):
            if isinstance(encoded, str):
                yield sample, Score(None, encoded)
            else:
                fitting.append((encoded, sample))
        fitting.sort(key=lambda each: len(each[0][0]) + len(each[0][1].ids))  # so that rows of one batch have similar lengths
        for start in tqdm(range(0, len(fitting), self.batch_size), desc="scoring", unit="batch", delay=2,
                          disable=True if self.quiet else None):  # fmt: skip
            some = fitting[start : start + self.batch_size]
            values = self._scores([encoded for encoded, _ in some])
            yield from ((sample, Score(value)) for (_, sample), value in zip(some, values, strict=True))

    def _encoded(self, samples: Sequence[Sample]) -> list[tuple[np.ndarray, Completion] | str]:
        """The token ids of each prompt and of all of its answer, or the reason why a sample has no score."""
        from halos.data.tokenize import Encoder

        encoder = Encoder(self.tokenizer, max_length=self.max_length, truncation="drop")
        demonstrations = [(Demonstration(sample.prompt.turns, ({"role": "assistant", "content": sample.text},)), sample.prompt.id)
                for sample in samples]  # fmt: skip
        return [each if isinstance(each, str) else (each.prompt, _whole(each.completions[0].ids))
                for each in encoder.encode(demonstrations)]  # fmt: skip

    def _scores(self, rows: Sequence[tuple[np.ndarray, Completion]]) -> list[float]:
        import torch

        from halos.data.collate import pack_on_host

        self.load()
        model = self._loaded
        with torch.no_grad():
            return model.scores(pack_on_host(list(rows), share=model.plan.shares).to(model.model.device))[:, self.label].tolist()

    def _load(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        from halos.distributed.device import has_bfloat16
        from halos.logps import model as logps
        from halos.logps.attention import SEGMENTS
        from halos.logps.plan import plan_for, remember
        from halos.models.load import load_weights, read_config, weights_dtype

        device = local_device()
        dtype = weights_dtype("auto", trained=False, half=has_bfloat16())
        plan = plan_for(read_config(self.directory), reward=RewardKind.OUTCOME, attention=SEGMENTS)
        extra = {"dtype": dtype, "attn_implementation": plan.attention, **SAFELY}
        with user_errors(f"{self.directory} could not be loaded as a reward model"):
            model = load_weights(AutoModelForSequenceClassification, self.directory, extra)
        remember(model, plan)
        if model.config.get_text_config().pad_token_id is None:
            model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return logps.RewardModel(model.to(device).eval())


def _tokenizer(directory: Path, day: date | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a reward model, with the chat template that its samples are written with; where that writes a date,
    it writes `day`."""
    from halos.data.template import template_of_run
    from halos.models.load import load_tokenizer

    tokenizer, _ = load_tokenizer(directory, add_tokens=[])
    tokenizer.chat_template = template_of_run(tokenizer, None, {}, "keep", day)
    return tokenizer


def _whole(ids: np.ndarray) -> Completion:
    """A completion all of whose tokens are read, its end of turn included."""
    return Completion(ids, np.ones(len(ids), bool))


SCORER = RewardModel
