"""The page of a dry run: gathers the facts of a prepared run, and writes them into the directory that the run would use."""

import logging
from collections.abc import Sequence

from accelerate import Accelerator

from halos.data.dataset import Dataset
from halos.inspection import lengths, publish, rows
from halos.inspection.facts import Fact, Facts, ShownRow
from halos.logs import Recorded
from halos.run.batch_source import DatasetSource, PolicySource
from halos.run.estimate import Estimate
from halos.run.prepare import PreparedRun

log = logging.getLogger(__name__)

COVERED = (
    "Checked as a run does before it reads weights: configuration, data, tokenizer and chat template, the model's structure with"
    " its adapter, the reference, the forward pass on a small copy, the optimizer, the disk."
)


def write(run: PreparedRun, accelerator: Accelerator, overrides: Sequence[str], header: Recorded) -> None:
    """Log estimates, write the page of a run with a data set or live prompts, and log its path."""
    tokenizer, batches, config = run.structure.tokenizer, run.batches, run.config
    renderer = rows.Renderer(tokenizer)
    if isinstance(batches, DatasetSource):
        names = batches.completed
        splits = [(name, split.rows) for name, split in batches.splits if isinstance(split.rows, Dataset)]
        shown = [renderer.row(*chosen, names) for chosen in rows.choose(splits, config.dry_run_rows)]
        sources = [fact for name, data in splits for fact in lengths.sources(name, data.report)]
        histograms = [fact for name, data in splits for fact in lengths.histograms(name, data, names)]
        steps, estimate = batches.steps(), Estimate(run, accelerator)
        memory, time = estimate.memory(), estimate.time(steps)
        work = [*steps.facts(config.train.batch_size), *time]
        for name, line in [*([("memory", memory.line())] if memory else []), *(("time", each.value) for each in time)]:
            log.info("%-10s %s", name, line)
    else:
        assert isinstance(batches, PolicySource)
        shown = [
            ShownRow("prompt", name, "as the sampler gets it", (renderer.prompt(ids),))
            for name, ids in batches.prompt_ids(config.dry_run_rows)
        ]
        memory, sources, histograms, work = None, [], [], [Fact("steps", f"{batches.total:,}", batches.lines()[0][1])]
    work += [Fact(name, line) for name, line in run.planned.lines]
    loss = config.loss_choice or run.loss.name
    facts = Facts(
        f"{config.exp_name}, {loss} of {config.model.name_or_path}", tuple(overrides), str(run.directory.path),
        header.lines(), COVERED, batches.checks, tuple(sources), tuple(histograms),
        run.structure.max_length, tuple(shown), tuple(work), memory.facts() if memory else (),
        publish.version_facts(tokenizer),
    )  # fmt: skip
    publish.save(facts, run.directory)
