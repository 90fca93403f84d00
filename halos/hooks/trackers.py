"""Experiment trackers, chosen by `logging=`. They get what metrics.jsonl gets and can never stop a run."""

import logging
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from halos.errors import UserError
from halos.hooks.base import AnyRun, Hook, Metrics, PlannedRun, Run

log = logging.getLogger(__name__)

NOT_METRICS = {"step", "split"}


def _named(metrics: Metrics) -> dict[str, float]:
    split = metrics["split"]
    return {f"{split}/{k}": v for k, v in metrics.items() if k not in NOT_METRICS and isinstance(v, int | float)}


def _flat(value: Any, name: str = "") -> dict[str, str | int | float | bool]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else key).items()}
    return {name: value if isinstance(value, str | int | float | bool) else str(value)}


def _text(turns: Any) -> str:
    """A dialogue as text; text is returned as it is."""
    return turns if isinstance(turns, str) else "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in turns)


def names_of(run: AnyRun) -> tuple[str, str | None]:
    """The name of a run, and the name of its sweep where it is a job of one: exp_name is then the sweep's, shared by all jobs."""
    path, exp_name = run.directory.path.absolute(), str(run.config.exp_name)
    return (path.name, exp_name) if path.parent.name == exp_name and path.name != exp_name else (exp_name, None)


class TensorBoard(Hook[AnyRun]):
    """Event files under the run directory's tensorboard/."""

    records = True

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("logging=tensorboard needs the package tensorboard: pip install tensorboard") from error
        self._open = SummaryWriter
        self._writer: SummaryWriter | None = None

    def on_start(self, run: AnyRun) -> None:
        if run.main:
            # purge_step hides what an earlier attempt wrote beyond the checkpoint from which this one resumes (or from the start)
            from_start = 0 if isinstance(run, Run) and run.config.resume else None
            self._writer = self._open(run.directory.path / "tensorboard", purge_step=run.step + 1 if run.step else from_start)
            self._writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in _flat(dict(run.settings)).items()), 0)

    def _write(self, run: AnyRun, metrics: Metrics) -> None:
        if self._writer is not None and metrics:
            for name, value in _named(metrics).items():
                self._writer.add_scalar(name, value, run.step)

    def on_step(self, run: AnyRun, metrics: Metrics) -> None:
        self._write(run, metrics)

    def on_eval(self, run: AnyRun, metrics: Metrics) -> None:
        self._write(run, metrics)

    def on_end(self, run: AnyRun) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb(Hook[AnyRun]):
    """Weights & Biases; offline, with one log line saying so, where no key is configured. Never prompts."""

    records = True

    def __init__(self, *, project: str, entity: str | None, mode: Literal["auto", "online", "offline"]) -> None:
        self.project, self.entity, self.mode = project, entity, mode
        self._run: Any = None
        self._id: str | None = None

    def _has_key(self) -> bool:
        if os.environ.get("WANDB_API_KEY"):
            return True
        netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        return netrc.is_file() and "api.wandb.ai" in netrc.read_text()

    def check(self, planned: PlannedRun) -> None:
        if self.mode == "online" and not self._has_key():
            raise UserError("hooks.wandb.mode=online needs a key: run `wandb login` or set WANDB_API_KEY; or use mode=auto")
        if find_spec("wandb") is None:
            raise UserError("logging=wandb needs the package wandb: pip install wandb")

    def on_start(self, run: AnyRun) -> None:
        if not run.main:
            return
        mode: Literal["online", "offline"] = "online" if self._has_key() else "offline"
        if self.mode != "auto":
            mode = self.mode
        if mode == "offline" and self.mode == "auto":
            log.info("wandb: no key found, so this run is logged offline under %s/wandb", run.directory.path)
        import wandb

        self._id = self._id or secrets.token_hex(4)
        try:
            self._run = self._init(run, mode)
        except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError) as error:
            log.warning("wandb could not be reached (%s); logging offline", str(error).splitlines()[0])
            self._run = self._init(run, "offline")

    def _init(self, run: AnyRun, mode: Literal["online", "offline"]) -> Any:
        import wandb

        name, group = names_of(run)
        excepthook = sys.excepthook
        try:
            return wandb.init(
                project=self.project,
                entity=self.entity,
                id=self._id,
                resume="allow",
                name=name,
                group=group,
                dir=str(run.directory.path),
                config=dict(run.settings),
                # with a key but no route to the server, wandb would block for a minute and a half
                settings=wandb.Settings(init_timeout=15, silent=True),
                mode=mode,
            )
        finally:
            sys.excepthook = excepthook  # wandb's writes the traceback once more, and does not hide secrets

    def _write(self, run: AnyRun, metrics: Metrics) -> None:
        if self._run is not None and metrics:
            self._run.log(_named(metrics), step=run.step)

    def on_step(self, run: AnyRun, metrics: Metrics) -> None:
        self._write(run, metrics)

    def on_eval(self, run: AnyRun, metrics: Metrics) -> None:
        self._write(run, metrics)

    def on_examples(self, run: AnyRun, examples: Sequence[Mapping[str, Any]]) -> None:
        if self._run is not None:
            import wandb

            columns: list[Any] = ["split", "reward", "prompt", "completion"]
            rows: list[Any] = [
                [row.get("split"), row.get("reward"), _text(row["prompt"]), _text(row["output"])] for row in examples
            ]
            self._run.log({"samples": wandb.Table(columns=columns, data=rows)}, step=run.step)

    def on_end(self, run: AnyRun) -> None:
        if self._run is not None:
            self._run.finish()

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._id = state.get("id")
