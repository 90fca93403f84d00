"""Which checkpoints are whole and known to be good, and the deletion of those that the policy lets go."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from halos.checkpoint import commit, known_good, manifest, select
from halos.hooks.base import Run
from halos.hooks.checkpoint import CheckpointHook
from halos.rundir import FULL

log = logging.getLogger(__name__)


class Pruner:
    """Deletes only what this attempt has itself verified or written, and never the newest that is known to be good."""

    def __init__(self, run: Run, policy: CheckpointHook) -> None:
        self.run, self.policy = run, policy
        self._whole: set[int] = set()  # steps whose checkpoints this attempt has verified or written; on the first process
        self._good_until = -1  # the step up to which checkpoints are known to be good, as it stands on the disk; there too
        self._told = False  # that good.json could not be written
        self._removal: Thread | None = None  # deletes older checkpoints beside the steps

    def start(self) -> None:
        """On the first process, before the first step."""
        self._whole = set(self._verified())
        self._good_until = min(known_good.read(self.run.directory).until, self.run.step)
        self._note(known_good.KnownGood(self._good_until))

    def saved(self, step: int) -> None:
        """On the first process: a checkpoint has become durable."""
        self._whole.add(step)
        if not self.note_good():
            self._prune()

    def note_good(self) -> bool:
        """Whether a checkpoint is known to be good now that was not: it is recorded, outside of what is sealed, and what was
        kept until then may go."""
        known = [step for step in self._whole if self._good_until < step <= self.run.finite_at]
        if not self.run.main or not known:
            return False
        if not self._note(known_good.KnownGood(max(known))):
            return False  # and what was kept stays
        self._good_until = max(known)
        self._prune()
        return True

    def wait(self) -> None:
        """For deletions that are under way: room that they free is wanted by the next save."""
        if self._removal is not None:
            self._removal.join()

    def end(self) -> None:
        """However the run ended."""
        self.wait()
        run = self.run
        if run.main and run.stop is not None and run.stop.failed:
            self._note(known_good.KnownGood(self._good_until, doubted_at=run.step))

    def _note(self, known: known_good.KnownGood) -> bool:
        """Whether it stands on the disk. One that is full costs the note, until a later step finds room."""
        try:
            known_good.write(self.run.directory, known)
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not self._told:
                log.warning("which checkpoints are good cannot be noted (%s): the last one that was is kept until it can", error)
            self._told = True
            return False
        self._told = False
        return True

    def _prune(self) -> None:
        self.wait()
        run, objective = self.run, self.run.config.objective
        paths = {select.step_of(path): path for path in select.checkpoints(run.directory.checkpoints)}
        # one that was damaged or taken away since it was verified must not stand for one that is there
        whole = [step for step in self._whole & paths.keys() if not manifest.verify(paths[step], contents=False)]
        scores = {step: select.score_of(paths[step], objective.metric) for step in whole}
        retention = self.policy.retention(largest=objective.mode == "max")
        with _best_effort():
            remove = commit.discard([paths[step] for step in retention.expendable(scores, self._good_until)])
            if self.policy.async_save:
                self._removal = Thread(target=_best_effort()(remove), name="retention")
                self._removal.start()
            else:
                remove()

    def _verified(self) -> Iterator[int]:
        """Steps of the checkpoints that are whole, each read once; the one that the run goes on from was, just before."""
        for path in select.checkpoints(self.run.directory.checkpoints):
            step = select.step_of(path)
            faults = [] if step == self.run.step else manifest.verify(path)
            if faults:
                log.warning("%s is not whole (%s): it is left as it is, and counts as none of those kept", path, faults[0])
            else:
                yield step


@contextmanager
def _best_effort() -> Iterator[None]:
    """What could not be deleted is told, and swept at the next start."""
    try:
        yield
    except OSError as error:
        log.warning("older checkpoints could not be deleted: %s", error)
