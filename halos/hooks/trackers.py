"""Experiment trackers, chosen by `logging=`. They see what metrics.jsonl sees and can never stop a run."""

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from halos.errors import UserError
from halos.hooks.base import Hook, Metrics, Run

log = logging.getLogger(__name__)

NOT_METRICS = {"step", "split"}


def _named(metrics: Metrics) -> dict[str, float]:
    split = metrics["split"]
    return {f"{split}/{k}": v for k, v in metrics.items() if k not in NOT_METRICS and isinstance(v, int | float)}


def _flat(value: Any, name: str = "") -> dict[str, str | int | float | bool]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else key).items()}
    return {name: value if isinstance(value, str | int | float | bool) else str(value)}


class TensorBoard(Hook):
    """Event files under the run directory's tensorboard/."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("logging=tensorboard needs the package tensorboard: pip install tensorboard") from error
        self._open, self._writer = SummaryWriter, None

    def on_start(self, run: Run) -> None:
        if run.main:
            # purge_step hides what an attempt that died wrote beyond the checkpoint this one goes on from
            self._writer = self._open(run.directory.path / "tensorboard", purge_step=run.step + 1 if run.step else None)
            self._writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in _flat(asdict(run.config)).items()), 0)

    def _write(self, run: Run, metrics: Metrics) -> None:
        if self._writer is not None and metrics:
            for name, value in _named(metrics).items():
                self._writer.add_scalar(name, value, run.step)

    def on_step(self, run: Run, metrics: Metrics) -> None:
        self._write(run, metrics)

    def on_eval(self, run: Run, metrics: Metrics) -> None:
        self._write(run, metrics)

    def on_end(self, run: Run) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb(Hook):
    """Weights & Biases; offline, with one line that says so, where no key is configured. Never prompts."""

    def __init__(self, *, project: str, entity: str | None, mode: Literal["auto", "online", "offline"]) -> None:
        self.project, self.entity, self.mode = project, entity, mode
        self._run: Any = None
        self._id: str | None = None

    def _has_key(self) -> bool:
        if os.environ.get("WANDB_API_KEY"):
            return True
        netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        return netrc.is_file() and "api.wandb.ai" in netrc.read_text()

    def on_start(self, run: Run) -> None:
        if not run.main:
            return
        mode = self.mode if self.mode != "auto" else "online" if self._has_key() else "offline"
        if mode == "online" and not self._has_key():
            raise UserError("hooks.wandb.mode=online needs a key: run `wandb login` or set WANDB_API_KEY; or use mode=auto")
        if mode == "offline" and self.mode == "auto":
            log.info("wandb: no key found, so this run is logged offline under %s/wandb", run.directory.path)
        import wandb

        self._id = self._id or wandb.util.generate_id()
        start = {"project": self.project, "entity": self.entity, "id": self._id, "resume": "allow", "name": run.config.exp_name}
        # the network is given 15 seconds: with a key and no route wandb would hold every process for a minute and a half
        settings = wandb.Settings(init_timeout=15, silent=True)
        place = {"dir": str(run.directory.path), "config": asdict(run.config), "settings": settings}
        try:
            self._run = wandb.init(**start, **place, mode=mode)
        except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError) as error:
            log.warning("wandb could not be reached (%s); logging offline", str(error).splitlines()[0])
            self._run = wandb.init(**start, **place, mode="offline")

    def _write(self, run: Run, metrics: Metrics) -> None:
        if self._run is not None and metrics:
            self._run.log(_named(metrics), step=run.step)

    def on_step(self, run: Run, metrics: Metrics) -> None:
        self._write(run, metrics)

    def on_eval(self, run: Run, metrics: Metrics) -> None:
        self._write(run, metrics)

    def on_end(self, run: Run) -> None:
        if self._run is not None:
            self._run.finish()

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._id = state.get("id")
