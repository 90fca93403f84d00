"""Delete the checkpoints that the retention policy does not keep; track which are whole and known to be good."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from halos.checkpoint import commit, known_good, manifest, select
from halos.confined import DISK_FULL
from halos.hooks.base import Run
from halos.hooks.checkpoint import CheckpointHook

log = logging.getLogger(__name__)


class Pruner:
    """Deletes only what this attempt has itself verified or written, and never the newest that is known to be good."""

    def __init__(self, run: Run, policy: CheckpointHook) -> None:
        self.run, self.policy = run, policy
        self._whole: set[int] = set()  # steps whose checkpoints this attempt verified or wrote; on rank 0
        self._good_until = -1  # as in good.json: the step up to which checkpoints are known to be good; on rank 0
        self._warned = False  # that good.json could not be written
        self._removal: Thread | None = None  # a thread that deletes older checkpoints

    def start(self) -> None:
        """Call on rank 0 before the first step."""
        self._whole = set(self._verified())
        self._good_until = min(known_good.read(self.run.directory).until, self.run.step)
        self._note(known_good.KnownGood(self._good_until))

    def saved(self, step: int) -> None:
        """Call on rank 0 when a checkpoint has become durable."""
        self._whole.add(step)
        if not self.note_good():
            self._prune()

    def note_good(self) -> bool:
        """If a later checkpoint than before has turned out to be good, record it and prune. Return whether it was recorded."""
        newly_good = [step for step in self._whole if self._good_until < step <= self.run.finite_at]
        if not self.run.main or not newly_good:
            return False
        if not self._note(known_good.KnownGood(max(newly_good))):
            return False  # nothing is pruned
        self._good_until = max(newly_good)
        self._prune()
        return True

    def wait(self) -> None:
        """Wait for deletions in progress: the next save may need the space that they free."""
        if self._removal is not None:
            self._removal.join()

    def end(self) -> None:
        """Call once, however the run ended."""
        self.wait()
        run = self.run
        if run.main and run.stop is not None and run.stop.failed:
            self._note(known_good.KnownGood(self._good_until, doubted_at=run.step))

    def _note(self, known: known_good.KnownGood) -> bool:
        """Write good.json; return whether it was written. On a full disk a later step tries again."""
        try:
            known_good.write(self.run.directory, known)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            if not self._warned:
                log.warning("good.json cannot be written (%s): the last checkpoint that it names is kept until it can", error)
            self._warned = True
            return False
        self._warned = False
        return True

    def _prune(self) -> None:
        self.wait()
        run, objective = self.run, self.run.config.objective
        paths = {select.step_of(path): path for path in select.checkpoints(run.directory.checkpoints)}
        # a checkpoint that was damaged or removed since must not count among those to keep
        whole = [step for step in self._whole & paths.keys() if not manifest.verify(paths[step], contents=False)]
        rows = run.directory.read_metrics() if self.policy.keep_best else []
        evaluations = {row["step"]: row for row in rows if row.get("split") == "eval"}  # a run that was stopped made some later
        scores = {step: select.score_of(paths[step], objective.metric, evaluations) for step in whole}
        retention = self.policy.retention(largest=objective.mode == "max")
        with _best_effort():
            remove = commit.discard([paths[step] for step in retention.expendable(scores, self._good_until)])
            if self.policy.async_save:
                self._removal = Thread(target=_best_effort()(remove), name="retention")
                self._removal.start()
            else:
                remove()

    def _verified(self) -> Iterator[int]:
        """Yield the steps of the whole checkpoints. The one that the run resumes from was verified just before."""
        for path in select.checkpoints(self.run.directory.checkpoints):
            step = select.step_of(path)
            faults = [] if step == self.run.step else manifest.verify(path)
            if faults:
                log.warning("%s is not whole (%s): it is left as it is, and does not count among those kept", path, faults[0])
            else:
                yield step


@contextmanager
def _best_effort() -> Iterator[None]:
    """Warn of what could not be deleted; the next start removes it."""
    try:
        yield
    except OSError as error:
        log.warning("older checkpoints could not be deleted: %s", error)
