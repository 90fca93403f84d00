"""A dry run of online rounds: what they would do, logged and as a page."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from halos.data.tokenize import Encoder
from halos.inspection import publish, rows, template_checks
from halos.inspection.facts import Fact, Facts, ShownRow
from halos.logs import Recorded
from halos.online import overview
from halos.online.plan import OnlinePlan
from halos.repository import COMMAND

log = logging.getLogger(__name__)

COVERED = (
    "Checked before the first round: configuration, prompts, scorer and sampler, tokenizer and chat template, and the training of"
    " each round without its rows, which the rounds sample: each training checks them when it starts."
)


def run(plan: OnlinePlan, tokenizer: PreTrainedTokenizerBase, write: Callable[[], None], typed: Sequence[str]) -> None:
    """Log what the run would do, and write the page. `write` logs the training of a round; `typed` are this command's words."""
    with Recorded() as header:
        write()
        overview.write(plan)
        log.info("training of each round: %s %s", COMMAND, " ".join(plan.overrides))
    encoder, renderer = Encoder(tokenizer, max_length=2**31, truncation="drop"), rows.Renderer(tokenizer)
    prompts = plan.prompts[: plan.config.dry_run_rows]
    ids = encoder.prompts([(prompt.turns, prompt.id) for prompt in prompts])
    shown = [ShownRow("prompt", prompt.id, "as the sampler gets it", (renderer.prompt(each),))
             for prompt, each in zip(prompts, ids, strict=True)]  # fmt: skip
    work = (Fact("rounds", str(plan.online.rounds), f"{len(plan.prompts):,} prompts, {plan.size.prompts:,} of them a round"),
            Fact("steps", f"up to {plan.size.steps:,} a round"))  # fmt: skip
    facts = Facts(
        title=f"{plan.config.exp_name}, rounds of {plan.online.loss}", overrides=tuple(typed), run=str(plan.directory.path),
        header=header.lines(), covers=COVERED, checks=template_checks.checks_of(tokenizer), rows=tuple(shown), work=work,
        versions=publish.version_facts(tokenizer),
    )  # fmt: skip
    publish.save(facts, plan.directory)
    log.info("everything fits together, nothing was started")
