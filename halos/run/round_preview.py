"""Check the training of online rounds before the first round: everything but its data, which do not exist yet."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date

import torch

from halos.config.bind import bind_loss
from halos.config.content_hashes import ContentHashes
from halos.config.resume_policy import Change
from halos.config.schema import Config
from halos.errors import UserError
from halos.hooks.base import AnyRun, Hook
from halos.run import header, input_hashes
from halos.run.prepare import DriverMachine, hooks_of, locate_base, plan_run, problem_with_hooks, run_facts, structure_of
from halos.run.render import decode_visibly
from halos.rundir import RunDir

log = logging.getLogger(__name__)


class RoundPreview:
    """Raises UserError as the first round's training would; `config` is that training's."""

    def __init__(self, config: Config, *, day: date, trackers: Mapping[str, Hook[AnyRun]]) -> None:
        self.config, self.loss = config, bind_loss(config.loss, config.plugins)
        checkpoint, hooks = hooks_of(config, self.loss)
        half = config.train.precision == "bfloat16" or config.model.dtype == "bfloat16"
        driver = DriverMachine(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "bf16" if half else "no")
        structure = self.structure = structure_of(config, self.loss, driver, locate_base(config), day)
        self.tokenizer, self.max_length = structure.tokenizer, structure.max_length
        planned = plan_run(config, structure, self.loss, total=1, main=True)
        if problem := problem_with_hooks(checkpoint, [*hooks.values(), *trackers.values()], planned):
            raise UserError(problem)

    def write(self, prompt: list[int]) -> None:
        """Log the header of a dry run: model, learning rate, and the first prompt as the sampler will get it."""
        header.write_model(self.config, self.loss, self.structure)
        header.write_learning_rate(self.config, None)
        log.info("%-10s %s", "prompt", decode_visibly(self.tokenizer, prompt))

    def content(self, outer: Config, prompts: Mapping[str, str | None]) -> ContentHashes:
        """Return the content hashes of the online run, whose configuration is `outer`, with those of its prompts."""
        base, reference = self.structure.loader.base, self.structure.reference
        return input_hashes.read(self._own(outer), self.tokenizer, prompts, base=base, reference=reference)

    def code(self, outer: Config) -> Mapping[str, str | None]:
        """Hash the user's own code that the rounds compute with."""
        return input_hashes.code(self._own(outer))

    def changed(self, outer: Config, directory: RunDir, now: ContentHashes) -> Sequence[Change]:
        """Compare with the last start of the online run. Raises UserError for changes that are not allowed."""
        own = replace(self._own(outer), run_dir=str(directory.path))
        return input_hashes.changed(own, run_facts(own, self.loss, self.structure), now)

    def _own(self, outer: Config) -> Config:
        """Return the training's configuration with the prompts and the scorer of the online run."""
        own = {name: getattr(outer, name) for name in ("data", "online", "resume", "resume_changes")}
        return replace(self.config, **own)
