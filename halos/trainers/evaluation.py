"""Evaluation: the loss over all evaluation data, in global batches of the training size, and over the rows of each source."""

import sys

import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm

from halos.data.dataset import Dataset
from halos.data.order import eval_batches
from halos.metrics import Meter, Window
from halos.trainers.guard import Contribution, Guard
from halos.trainers.microbatches import Split
from halos.trainers.objective import Objective


class EvaluatedObjective(Objective):
    """An objective with evaluation data, which a subclass sets."""

    eval_data: Split | None
    guard: Guard
    evaluates_by_source = True  # not in a run that an earlier version began

    def _eval_means(self) -> dict[str, float]:
        """Mean metrics over the evaluation data, and of several sources over the rows of each, as `NAME/metric`; empty after a
        stop request. A batch has rows of one source, so a source's metrics are those of an evaluation on it alone."""
        run, parts, data = self.run, list[Contribution](), self.eval_data
        assert data is not None
        names, sources = self._eval_sources(data)
        meters = {number: Meter() for number in np.unique(sources).tolist()}
        quiet = not run.main or not sys.stderr.isatty()
        groups = data.rows.groups if self.loss.on_rollouts else None  # of which advantages are computed
        batches = eval_batches(sources, self.settings.batch_size, groups)
        for indices in tqdm(batches, desc="held out", unit="batch", leave=False, disable=quiet):
            run.sync_stop_request()
            if run.stopped_early:
                break
            parts += self._evaluate_batch(data, indices, meters[int(sources[indices[0]])])
        run.strategy.reshard(run.module)
        if run.stopped_early:
            return {}
        window, by_source = Window(), dict[str, float]()
        for number, meter in meters.items():
            totals = meter.reduce(lambda table: run.accelerator.reduce(table, reduction="sum"), gather_object)
            window.add(totals)
            if len(names) > 1:
                own = Window()
                own.add(totals)
                means = self._completed(own, int((sources == number).sum()))
                by_source |= {f"{names[number]}/{metric}": value for metric, value in means.items()}
        self.guard.check_evaluation(data, parts, window.means()["loss"])
        return by_source | self._completed(window, len(data.rows))

    def _eval_sources(self, data: Split) -> tuple[tuple[str, ...], np.ndarray]:
        """The names of the sources that are measured apart, and which of them each row is of: (rows,)."""
        rows = data.rows
        if self.evaluates_by_source and isinstance(rows, Dataset):
            return rows.names, rows.sources
        return ("",), np.zeros(len(rows), np.int64)

    def _evaluate_batch(self, data: Split, indices: np.ndarray, meter: Meter) -> list[Contribution]:
        parts, microbatches = [], self._microbatches(data, indices)
        statistics = self._statistics(microbatches, len(indices))
        for microbatch in self._in_turn(microbatches):
            loss = self._loss(microbatch, statistics, len(indices))
            meter.add(self._means(loss, microbatch), microbatch.weight)
            if microbatch.weight:
                values = loss.values.reshape(len(microbatch.positions), -1).sum(-1)
                parts.append(Contribution(indices[microbatch.positions], microbatch.positions, values))
        return parts

    def _completed(self, window: Window, examples: int) -> dict[str, float]:
        """Means and what is derived of them."""
        means = window.means()
        return {**means, **self.derived(means), "examples": examples}
