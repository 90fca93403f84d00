"""Guards the loop: a step whose loss or gradient is not finite is skipped, recorded and counted, and may end the run."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from halos.checkpoint import known_good
from halos.confined import DISK_FULL
from halos.data.dataset import Dataset
from halos.data.stream import StreamRows
from halos.distributed.parameters import local_part
from halos.errors import UserError
from halos.examples import Item
from halos.hooks.base import Run, Stop
from halos.trainers.microbatches import Split

log = logging.getLogger(__name__)

MAX_TEXTS = 8  # rows per rank whose text is recorded, where their own loss is not finite
MAX_NAMED = 3  # rows or tensors that a message names


@dataclass(frozen=True, slots=True)
class Contribution:
    """The losses of the rows of one micro-batch."""

    rows: Any  # (rows,) numpy: indices into the split
    positions: Any  # (rows,) numpy: indices into the global batch
    values: Tensor  # (rows,) or (rows, time)


def propagate_nonfinite(loss: Tensor, outputs: Iterable[Tensor]) -> Tensor:
    """Make the gradient of a loss that is not finite not finite either, through each of the model's `outputs`.

    Where logits are masked with -inf, or a clip zeroes the gradient, an infinite or NaN loss can have a finite gradient. This way
    the gradient norm alone decides whether a step is skipped, under every strategy. To a finite loss only zeros are added.
    """
    zero_or_nan = loss.detach() * 0
    return loss + sum((zero_or_nan * output).sum() for output in outputs if output.requires_grad)


class Guard:
    """Decides by the gradient norm whether a step counts; the same on every rank. DeepSpeed's engine steps by the same rule.

    Finite and not zero: the weights before the step are good, and so is a checkpoint of them. Not finite: the step is skipped.
    The data, the schedule, random numbers and counts advance; weights, optimizer state and an adaptive KL coefficient do not.
    """

    def __init__(
        self, run: Run, forward: Callable[[Sequence[Item]], Any], rows_of: Callable[[int], Sequence[Item]] = lambda _: ()
    ) -> None:
        """`forward` is the model's output for items, called by every rank; `rows_of` gives this rank's first items of a step."""
        self.run, self._forward, self._rows_of = run, forward, rows_of
        self._probe: Sequence[Item] = ()  # items of this rank whose forward pass was finite
        self._finite_loss_at: int | None = None  # the step of the last evaluation, where its loss was finite

    # --- steps -----------------------------------------------------------------------------------------------------------

    def passes(self, norm: float, items: Sequence[Item]) -> bool:
        """Whether the optimizer may step, called before `run.step` counts the step. `items`: some of the step's.

        A gradient of zeros, as groups of equal rewards give, proves nothing about the weights.
        """
        if math.isfinite(norm) and norm > 0:
            self.run.bad_steps, self.run.finite_at, self._probe = 0, self.run.step, items
        return math.isfinite(norm)

    def skip(self, split: Split, parts: Sequence[Contribution], *, loss: float, norm: float) -> None:
        """Count a skipped step, once `run.step` has; record its rows, and end the run after `train.max_bad_steps` in a row."""
        run, limit = self.run, self.run.config.train.max_bad_steps
        run.bad_steps += 1
        run.skipped_steps += 1
        rows = self._gather_rows(split, parts, include_finite=True)
        what = f"gradient norm {norm:.4g}, loss {loss:.4g}{_suspects(rows, of=len(rows))}"
        self._record("train", rows, loss=loss, norm=norm)
        log.warning(
            "step %d was skipped: %s. Its %d rows are in %s; %d in a row of %s (train.max_bad_steps), %d so far", run.step, what,
            len(rows), run.directory.bad_rows, run.bad_steps, limit or "any number", run.skipped_steps,
        )  # fmt: skip
        if limit is not None and run.bad_steps >= limit:
            first = run.step - run.bad_steps + 1
            steps = f"step {run.step} was" if first == run.step else f"steps {first} to {run.step} were all"
            self._fail(f"{steps} not finite: {what}")

    def check_evaluation(self, split: Split, parts: Sequence[Contribution], loss: float) -> None:
        """Where an evaluation loss is not finite, record the rows and warn.

        A finite one does not make a checkpoint good: with normalisation layers, weights after a step at a learning rate of 1e20
        still give a finite loss, but not a finite gradient.
        """
        run = self.run
        self._finite_loss_at = run.step if math.isfinite(loss) else None
        if self._finite_loss_at is not None:
            return
        rows = self._gather_rows(split, parts, include_finite=False)
        self._record("eval", rows, loss=loss, norm=None)
        log.warning(
            "step %d: the held-out loss is %.4g, by %d of %d rows%s; they are in %s", run.step, loss, len(rows), len(split.rows),
            _suspects(rows, of=len(split.rows)), run.directory.bad_rows,
        )  # fmt: skip

    # --- weights ---------------------------------------------------------------------------------------------------------

    def refuse_initial_weights(self) -> None:
        """Raises UserError where the initial weights are not finite: no step would be."""
        if problem := self._broken_tensors():
            run = self.run
            source = f"the checkpoint of step {run.step}" if run.step else f"model.name_or_path={run.config.model.name_or_path}"
            raise UserError(f"{source} cannot be trained: {problem}. Choose another {'checkpoint' if run.step else 'model'}")

    def refuse_final(self) -> bool:
        """Whether to write no FINAL, because the last weights or their outputs are not finite, or all steps were skipped. The run
        then ends as failed."""
        run, problem = self.run, self._broken_tensors()
        if problem is None and run.skipped_steps >= run.step > 0:
            problem = f"all {run.step} steps were skipped, so nothing was trained"
        if problem is None and self._finite_loss_at != run.step and not self._probe_is_finite():
            problem = "with the last weights the log-probs or scores of rows that had been finite are not finite"
        if problem is not None:
            self._fail(f"no FINAL was saved: {problem}")
        else:
            run.finite_at = run.step
        return problem is not None

    def _broken_tensors(self) -> str | None:
        names = sorted({name for part in gather_object([not_finite(self.run.module)]) for name in part})
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        verb = "holds" if len(names) == 1 else "hold"
        return f"{', '.join(names[:MAX_NAMED])}{more} {verb} values that are not finite" if names else None

    @torch.no_grad()
    def _probe_is_finite(self) -> bool:
        """Test the last weights by one forward pass, where no evaluation did. Every rank calls."""
        # where no step of this attempt was finite, the rows of the last finite step before it
        probe = self._probe or (self._rows_of(self.run.finite_at) if self.run.finite_at >= 0 else ())
        if not probe:
            return True
        self.run.module.eval()
        leaves = [leaf for leaf in tree_leaves(self._forward(probe)) if leaf.is_floating_point()]
        self.run.strategy.reshard(self.run.module)
        fine = all(bool(torch.isfinite(leaf).all()) for leaf in leaves)
        return all(gather_object([fine]))

    # --- messages and records --------------------------------------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        self.run.failure = f"{reason}. {self._advice()}"
        self.run.stop = Stop(self.run.failure, finished=False, failed=True)

    def _advice(self) -> str:
        run, config = self.run, self.run.config
        keys = [f"a lower optim.lr (now {config.optim['lr']:g})"]
        keys += ["train.max_grad_norm=1 (now null)"] if config.train.max_grad_norm is None else []
        keys += ["train.precision=float32"] if run.accelerator.mixed_precision != "no" else []
        rows = f"Look at the rows in {run.directory.bad_rows}; where they are right, " if run.skipped_steps else "Perhaps "
        until = known_good.read(run.directory).until
        origin = (
            f"the checkpoint of step {until}, the last good one" if until >= 0 else "step 0: no checkpoint is known to be good"
        )
        return (
            f"{rows}{' or '.join(keys)} helps (resume_changes=allow lets a run change that). resume={run.directory.path}"
            f" resumes from {origin}"
        )

    def _record(self, split: str, rows: list[dict[str, Any]], *, loss: float, norm: float | None) -> None:
        run = self.run
        facts = {"step": run.step, "split": split, "loss": _for_json(loss), "lr": run.optimizer.param_groups[0]["lr"]}
        facts |= {"grad_norm": _for_json(norm), "bad_steps": run.bad_steps} if norm is not None else {}
        if not run.main:
            return
        try:
            run.directory.append_bad_rows({**facts, "rows": rows})
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            log.warning("%s could not be written, and lacks the rows of this step: %s", run.directory.bad_rows, error)

    def _gather_rows(self, split: Split, parts: Sequence[Contribution], *, include_finite: bool) -> list[dict[str, Any]]:
        """All ranks' rows whose own loss is not finite, or all rows with `include_finite`. Every rank calls."""
        own: list[dict[str, Any]] = []
        for part in parts:
            losses = part.values.double().reshape(len(part.rows), -1).sum(-1).tolist()
            for number, position, loss in zip(part.rows.tolist(), part.positions.tolist(), losses, strict=True):
                if include_finite or not math.isfinite(loss):
                    own.append({"place": position, **self._describe(split, number, loss)})
        with_text = [row for row in own if isinstance(row["loss"], str)][:MAX_TEXTS]
        for row in (
            own if not isinstance(split.rows, Dataset | StreamRows) else with_text
        ):  # sampled text is recorded nowhere else
            row |= self._text(split.rows[row["row"]])
        gathered = [row for part in gather_object([own]) for row in part]
        return sorted(gathered, key=lambda row: (row["place"], row["row"]))

    def _describe(self, split: Split, number: int, loss: float) -> dict[str, Any]:
        item = split.rows[number]
        reward = {"reward": _for_json(item.labels["reward"])} if "reward" in split.rows.labels else {}
        return {"row": number, "id": item.id, "rank": self.run.accelerator.process_index, "loss": _for_json(loss), **reward}

    def _text(self, item: Item) -> dict[str, Any]:
        decode = self.run.tokenizer.decode
        return {"prompt": decode(item.prompt), "completions": [decode(completion.ids) for completion in item.completions]}


def not_finite(module: nn.Module) -> list[str]:
    """Names of the trained tensors with a value that is not finite, in this rank's shards."""
    parts = {name: local_part(p) for name, p in module.named_parameters() if p.requires_grad}
    parts = {name: part.detach() for name, part in parts.items() if part.numel()}
    if not parts:
        return []
    # minimum and maximum are NaN where any value is: one pass, no copy, and the host waits once
    extremes = torch.stack([torch.stack(part.aminmax()).float() for part in parts.values()])
    fine = torch.isfinite(extremes).all(-1).tolist()
    return [name.removeprefix("module.").removeprefix("model.") for name, good in zip(parts, fine, strict=True) if not good]


def _for_json(value: float) -> float | str:
    """A number as JSON takes it; nan and infinity as text."""
    return value if math.isfinite(value) else str(value)


def _suspects(rows: Sequence[Mapping[str, Any]], *, of: int) -> str:
    """The rows whose own loss is not finite, for a message; empty where that is all rows or none, which tells nothing."""
    names = [row["id"] for row in rows if isinstance(row["loss"], str)]
    if not names or len(names) == of > 1:
        return ""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f" ({', '.join(names[:MAX_NAMED])}{more})"
