"""Alarms: what the metrics of a run say is going wrong, once for each condition, with what to try."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from statistics import fmean, median
from typing import Annotated, Any, Literal

from halos.confined import DISK_FULL
from halos.hooks.base import Hook, Metrics, Run, Stop
from halos.types import Range

log = logging.getLogger(__name__)

# metrics that are watched: the mean of the first `patience` logged steps, and the last ones, are state
CHOSEN, ACCURACY, LENGTH = "logps/chosen", "rewards/accuracies", "length"
LOSS, NORM, Z0, KL, CLIPPED = "loss", "grad_norm", "z0", "kl", "clip_fraction"
EQUAL, ESS = "groups/all_equal", "mismatch/ess"
WATCHED = (CHOSEN, ACCURACY, LENGTH, LOSS, NORM, Z0, KL, CLIPPED, EQUAL, ESS)
RISES = 0.05  # of rewards/accuracies, beside which a fall of the chosen completions counts
SAME = 1e-5  # of a loss, relative, to be that of the start
MAX_SPIKES, MAX_NAMED = 20, 3  # recorded with their rows; rows that a message names


class Alarms(Hook):
    """Looks at each logged line of metrics, which the host has anyway: it costs no step anything, and is the same on every rank.

    A condition holds when the means of the last `patience` logged steps say so. `act` stop ends the run at the first one, with a
    checkpoint; warn only says it. A resumed run goes on with what it knew, and repeats no warning.
    """

    def __init__(
        self,
        *,
        act: Literal["warn", "stop"],
        patience: Annotated[int, Range(least=2)] = 20,
        fall: Annotated[float, Range(above=0)] = 0.3,
        drift: Annotated[float, Range(above=1)] = 1.5,
        clipped: Annotated[float, Range(above=0, most=1)] = 0.4,
        equal: Annotated[float, Range(above=0, most=1)] = 0.9,
        effective: Annotated[float, Range(least=0, most=1)] = 0.5,
        spike: Annotated[float, Range(above=1)] = 10.0,
    ) -> None:
        self.act, self.patience = act, patience
        self.fall, self.drift, self.clipped, self.equal, self.effective, self.spike = (
            fall,
            drift,
            clipped,
            equal,
            effective,
            spike,
        )
        self._first: dict[str, list[float]] = {}  # number of logged steps and their mean, until there are `patience`
        self._last: dict[str, list[float]] = {}
        self._said: list[str] = []
        self._spikes, self._seen = 0, -1  # recorded so far; the last step whose line was seen

    def on_step(self, run: Run, metrics: Metrics) -> None:
        if not metrics:
            return
        since, self._seen = self._seen, run.step
        self._raise(run, "spike", self._spike(run, metrics, since))  # compared with the steps before it
        for name in WATCHED:
            if (value := metrics.get(name)) is not None and math.isfinite(value):
                self._remember(name, float(value))
        for name, found in self._conditions():
            self._raise(run, name, found)

    def _remember(self, name: str, value: float) -> None:
        count, mean = self._first.get(name, [0, 0.0])
        if count < self.patience:
            self._first[name] = [count + 1, (mean * count + value) / (count + 1)]
        self._last[name] = [*self._last.get(name, []), value][-2 * self.patience :]

    def _raise(self, run: Run, name: str, found: str | None) -> None:
        """Say what was found, the first time that it is; with `stop` end the run."""
        if found is None or name in self._said:
            return
        self._said.append(name)
        if run.main:
            log.warning("step %d: %s", run.step, found)
        if self.act == "stop" and run.stop is None:
            run.stop = Stop(f"train.alarms=stop: {found}", finished=False)

    # --- conditions ------------------------------------------------------------------------------------------------------

    def _conditions(self) -> Iterator[tuple[str, str | None]]:
        yield "chosen falls", self._chosen_falls()
        yield "length drifts", self._length_drifts()
        yield "z0 is 0", self._z0_is_stuck()
        yield "clipped", self._is_clipped()
        yield "loss stays", self._loss_stays()
        yield "groups equal", self._groups_equal()
        yield "mismatch", self._mismatch()

    def _recent(self, name: str, times: int = 1) -> Sequence[float]:
        """The values of the last `times * patience` logged steps; empty while there are fewer."""
        values, count = self._last.get(name, []), times * self.patience
        return values[-count:] if len(values) >= count else ()

    def _moved(self, name: str) -> tuple[float, float] | None:
        """The means of the first and of the last `patience` logged steps, where these are others."""
        recent = self._recent(name, 2)
        return (self._first[name][1], fmean(recent[-self.patience :])) if recent else None

    def _chosen_falls(self) -> str | None:
        chosen, accuracy = self._moved(CHOSEN), self._moved(ACCURACY)
        if chosen is None or accuracy is None or accuracy[1] - accuracy[0] < RISES:
            return None
        if chosen[0] - chosen[1] <= self.fall * abs(chosen[0]):
            return None
        return (
            f"the chosen completions become less likely ({CHOSEN} from {chosen[0]:.4g} to {chosen[1]:.4g}) while"
            f" {ACCURACY} rises ({accuracy[0]:.2f} to {accuracy[1]:.2f}): both completions of a pair are unlearned. Try loss=rpo"
            " or loss=dpop, which hold on to the chosen ones, a larger loss.beta, a lower optim.lr, or fewer epochs"
        )

    def _length_drifts(self) -> str | None:
        moved = self._moved(LENGTH)
        if moved is None or 1 / self.drift < moved[1] / max(moved[0], 1e-9) < self.drift:
            return None
        return (
            f"sampled completions went from {moved[0]:.4g} to {moved[1]:.4g} tokens ({LENGTH}): read some, since the reward may"
            " pay for length. Try loss.aggregation=token or constant, halos.online.rewards.overlong, or online.truncated=mask"
        )

    def _z0_is_stuck(self) -> str | None:
        z0, kl = self._recent(Z0), self._recent(KL)
        if not z0 or any(z0) or not kl or not any(kl):
            return None
        return (
            f"z0 was 0 in the last {self.patience} logged steps (its estimate, {KL}, is {fmean(kl):.3g} on average, and clamped"
            " at 0): KTO then compares with nothing. Try a larger train.batch_size, a lower optim.lr, or a smaller loss.beta"
        )

    def _is_clipped(self) -> str | None:
        recent = self._recent(CLIPPED)
        if not recent or fmean(recent) <= self.clipped:
            return None
        return (
            f"the clip acts on {fmean(recent):.0%} of the tokens ({CLIPPED}), which then learn nothing. Try a lower optim.lr,"
            " fewer passes over the same samples (train.epochs, online.epochs), or wider loss.clip_low and loss.clip_high"
        )

    def _loss_stays(self) -> str | None:
        recent = self._recent(LOSS, 2)
        if not recent or max(recent) - min(recent) > SAME * abs(recent[0]) or self._first[LOSS][1] == 0:
            return None
        if abs(recent[-1] - self._first[LOSS][1]) > SAME * abs(self._first[LOSS][1]):
            return None
        return (
            f"the loss is still what it was at the start, {recent[-1]:.6g}, after {2 * self.patience} logged steps and more:"
            " nothing is learned. Try a higher optim.lr or a shorter schedule.warmup, and look whether chosen and rejected"
            " completions differ"
        )

    def _groups_equal(self) -> str | None:
        recent = self._recent(EQUAL)
        if not recent or fmean(recent) < self.equal:
            return None
        return (
            f"of {fmean(recent):.0%} of the prompts all rewards are equal ({EQUAL}), so that their samples teach nothing. Try"
            " prompts of another difficulty, more online.samples_per_prompt, a higher temperature, or rewards with more than two"
            " values"
        )

    def _mismatch(self) -> str | None:
        recent = self._recent(ESS)
        if not recent or fmean(recent) >= self.effective:
            return None
        return (
            f"the sampler and this trainer give the samples such different log-probs that they count as {fmean(recent):.0%} of"
            f" their number ({ESS}): it has other weights, another dtype or temperature. Try sampling more often, float32, or"
            " train.correction_cap"
        )

    # --- a spike, and the rows behind it ---------------------------------------------------------------------------------

    def _spike(self, run: Run, metrics: Metrics, since: int) -> str | None:
        """A gradient norm far above those before it; its rows are recorded."""
        before, norm = self._recent(NORM), metrics.get(NORM)
        if not before or norm is None or not math.isfinite(norm) or norm <= self.spike * median(before):
            return None
        steps = range(since if since >= 0 else run.step - 1, run.step)
        rows = [row for step in steps for row in run.rows_of_step(step)] if run.rows_of_step is not None else []
        self._record(run, metrics, rows)
        more = f" and {len(rows) - MAX_NAMED} more" if len(rows) > MAX_NAMED else ""
        named = f": {', '.join(rows[:MAX_NAMED])}{more}; all are in {run.directory.bad_rows}" if rows else ""
        times = norm / median(before)
        return (
            f"the gradient norm is {norm:.4g}, {times:.0f} times that of the steps before. Look at its rows{named}."
            " Where they are right, a lower optim.lr or train.max_grad_norm helps"
        )

    def _record(self, run: Run, metrics: Metrics, rows: Sequence[str]) -> None:
        self._spikes += 1
        if not run.main or not rows or self._spikes > MAX_SPIKES:
            return
        facts = {"step": run.step, "split": "train", "loss": metrics.get(LOSS), "grad_norm": metrics[NORM]}
        try:
            run.directory.append_bad_rows({**facts, "spike": True, "rows": [{"id": row} for row in rows]})
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            log.warning("%s could not be written, and lacks the rows of this step: %s", run.directory.bad_rows, error)

    def state_dict(self) -> dict[str, Any]:
        known = {"first": {name: list(each) for name, each in self._first.items()}, "last": dict(self._last)}
        return {**known, "said": list(self._said), "spikes": self._spikes, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first, self._last = dict(state.get("first", {})), dict(state.get("last", {}))
        self._said, self._spikes, self._seen = list(state.get("said", [])), state.get("spikes", 0), state.get("seen", -1)
