"""What each round of an online workflow will train, looked at before the first one: all but the rows, which are not there yet."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from halos.config.bind import bind_loss
from halos.config.content_hashes import ContentHashes
from halos.config.resume_policy import Change
from halos.config.schema import Config
from halos.errors import UserError
from halos.hooks.base import AnyRun, Hook
from halos.run import contents, header
from halos.run.blueprint import Driver, complaint, computed, draw, hooks_of, locate_base, structure_of
from halos.run.datasets import learns_from_single
from halos.run.shown import visible
from halos.rundir import RunDir

log = logging.getLogger(__name__)


class Outline:
    """Raises UserError as the first round's training would; `config` is that training's."""

    def __init__(self, config: Config, *, samples_per_prompt: int, trackers: Mapping[str, Hook[AnyRun]]) -> None:
        self.config, self.loss = config, bind_loss(config.loss, config.plugins)
        if samples_per_prompt == 1 and self.loss.on_rollouts and not learns_from_single(self.loss):
            raise UserError(f"online.samples_per_prompt=1: {self.loss.name} compares samples of one prompt: 2 or more")
        checkpoint, hooks = hooks_of(config, self.loss)
        half = config.train.precision == "bfloat16" or config.model.dtype == "bfloat16"
        driver = Driver(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "bf16" if half else "no")
        structure = self.structure = structure_of(config, self.loss, driver, locate_base(config))
        self.tokenizer, self.max_length = structure.tokenizer, structure.max_length
        blueprint = draw(config, structure, self.loss, total=1, main=True)
        if problem := complaint(checkpoint, [*hooks.values(), *trackers.values()], blueprint):
            raise UserError(problem)

    def write(self, prompt: list[int]) -> None:
        """The header of a dry run: what is trained, at which rate, and the first prompt as a sampler is fed it."""
        header.write_model(self.config, self.loss, self.structure)
        header.write_rate(self.config, None)
        log.info("%-10s %s", "prompt", visible(self.tokenizer, prompt))

    def content(self, whole: Config, prompts: Mapping[str, str | None]) -> ContentHashes:
        """What the rounds of `whole` stand on, with the hashes of their prompts."""
        base, reference = self.structure.shelf.base, self.structure.named
        return contents.read(self._own(whole), self.tokenizer, prompts, base=base, reference=reference)

    def changed(self, whole: Config, directory: RunDir, now: ContentHashes) -> Sequence[Change]:
        """What of it has changed since they last started. Raises UserError for what was not allowed."""
        own = replace(self._own(whole), run_dir=str(directory.path))
        return contents.changed(own, computed(own, self.loss, self.structure), now)

    def _own(self, whole: Config) -> Config:
        """The training's configuration with the prompts and scorer of the workflow."""
        own = {name: getattr(whole, name) for name in ("data", "online", "resume", "resume_changes")}
        return replace(self.config, **own)
