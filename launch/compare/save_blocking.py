#!/usr/bin/env python3
"""Measure how long a checkpoint blocks training, synchronous and asynchronous, and how much memory it costs.

    python launch/compare/save_blocking.py MODEL [--every 10] [--saves 5] [--batch-size 4] [--growth 50]

Full fine-tuning of MODEL in float32 on the bundled data, one run with checkpoint.async_save=false and one with true, each in
a process of its own. The blocked time is compared with one copy of the same state (weights and Adam's moments) into allocated
memory, in the same process, and with the median step. Then --growth saves follow in a row, one after each step, while resident
memory is recorded.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MIB = 2**20


def resident(field: str = "VmRSS") -> float:
    """Return VmRSS or VmHWM of this process, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / MIB


class Watch:
    """Times the trainer's steps and, separately, how long saves block them."""

    def __init__(self, trainer: Any) -> None:
        self.steps: list[float] = []
        self.during_write: list[bool] = []  # whether a save was being written during the step
        self.waits: list[float] = []  # for each save
        self.resident: list[float] = []
        self._trainer, self._waited, self._depth = trainer, 0.0, 0
        checkpointer = trainer.checkpointer
        step, save, finish, on_save = trainer.step, checkpointer.save, checkpointer.finish_save, checkpointer.policy.on_save

        def stepping(indices: Any) -> Any:
            writing, began, before = checkpointer.written is not None, time.perf_counter(), self._waited
            totals = step(indices)
            self.steps.append(time.perf_counter() - began - (self._waited - before))
            self.during_write.append(writing)
            return totals

        def waiting(call: Any) -> Any:
            def timed(*args: Any, **kwargs: Any) -> None:
                self._depth, began = self._depth + 1, time.perf_counter()
                call(*args, **kwargs)
                self._depth -= 1
                if not self._depth:
                    self._waited += time.perf_counter() - began

            return timed

        def keeping(run: Any, path: Path, *, final: bool) -> Any:
            if not final:
                self.resident.append(resident())
            return on_save(run, path, final=final)

        trainer.step, checkpointer.save, checkpointer.finish_save = stepping, waiting(save), waiting(finish)
        checkpointer.policy.on_save = keeping

    @property
    def waited(self) -> float:
        return self._waited


def act(model: str, place: Path, *, apart: bool, every: int, saves: int, batch_size: int) -> dict[str, Any]:
    import hydra
    import torch

    from halos.config import validate
    from halos.distributed.launch import make_accelerator
    from halos.run.assemble import assemble

    words = ["loss=sft", "data=arithmetic", f"model.name_or_path={model}", "model.dtype=float32", "data.eval=[]",
             f"train.batch_size={batch_size}", f"train.microbatch_size={batch_size}", "train.activation_checkpointing=false",
             f"train.steps={every * saves + every}", f"checkpoint.every={every}", f"checkpoint.async_save={apart}",
             "exp_name=run", f"run_dir={place / 'run'}"]  # fmt: skip
    with hydra.initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        config = validate.check(hydra.compose("config", words), words)
    trainer = assemble(config, [], make_accelerator(config.train.precision, config.model.dtype))
    assert trainer is not None
    watch, run, waits = Watch(trainer), trainer.run, []
    trainer.checkpointer.start()
    run.call_hooks(lambda hook: hook.on_start(run))
    for number in range(1, every * saves + every + 1):
        before = watch.waited
        trainer.step(trainer.order.batch(run.step))
        if number % every == 0 and number <= every * saves:
            trainer.checkpointer.save(final=False)
            waits.append(0.0)
        if waits:
            waits[-1] += watch.waited - before
    trainer.checkpointer.finish_save()
    peak = resident("VmHWM")
    state = list({value.data_ptr(): value.detach() for value in run.module.state_dict().values()}.values())  # tied: once
    state += [part for moments in run.optimizer.state.values() for part in moments.values() if torch.is_tensor(part)]
    copies = [torch.empty_like(value).copy_(value) for value in state]
    memcpy = []
    for _ in range(5):
        began = time.perf_counter()
        for copy, value in zip(copies, state, strict=True):
            copy.copy_(value)
        memcpy.append(time.perf_counter() - began)
    alone = [seconds for seconds, writing in zip(watch.steps, watch.during_write, strict=True) if not writing]
    overlapped = [seconds for seconds, writing in zip(watch.steps, watch.during_write, strict=True) if writing]
    return {
        "state": sum(value.nbytes for value in state) / MIB, "memcpy": statistics.median(memcpy), "waits": waits,
        "step": statistics.median(alone or overlapped), "overlapped": statistics.median(overlapped) if overlapped else None,
        "peak": peak,
        "resident": watch.resident,
    }  # fmt: skip


def alone(args: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, __file__, args.model, "--place", place, "--act", json.dumps(settings)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            sys.exit(f"{settings} failed:\n{process.stderr[-3000:]}")
        return json.loads(process.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory or a hub id")
    parser.add_argument("--every", type=int, default=10, help="steps from one save to the next (default: 10)")
    parser.add_argument("--saves", type=int, default=5, help="how many are timed; the first is reported separately (default: 5)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step (default: 4)")
    parser.add_argument("--growth", type=int, default=50, help="saves in a row while memory is recorded; 0: none (default: 50)")
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--act", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.act is not None:
        print(json.dumps(act(args.model, args.place, **args.act)))
        return
    if args.saves < 2:
        parser.error("--saves: at least 2, since the first is reported separately")
    settings = {"every": args.every, "saves": args.saves, "batch_size": args.batch_size}
    results = {name: alone(args, apart=name == "async", **settings) for name in ("sync", "async")}
    print(
        f"state {results['sync']['state']:.0f} MiB; checkpoint.every={args.every}; {args.saves} saves, the first one separately\n"
    )
    print(
        "| checkpoint.async_save | blocked | first | / memcpy | / steps of an interval | step | step during a write | peak MiB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, numbers in results.items():
        wait = statistics.median(numbers["waits"][1:])
        fraction = wait / args.every / numbers["step"]
        overlapped = f"{numbers['overlapped']:.2f} s" if numbers["overlapped"] else ""
        print(
            f"| {str(name == 'async').lower()} | {wait:.2f} s | {numbers['waits'][0]:.2f} s | {wait / numbers['memcpy']:.2f} "
            f"| {fraction:.1%} | {numbers['step']:.2f} s | {overlapped} | {numbers['peak']:.0f} |", flush=True,
        )  # fmt: skip
    if args.growth:
        grown = alone(args, apart=True, every=1, saves=args.growth, batch_size=1)["resident"]
        tenth = max(1, args.growth // 10)
        first, last = statistics.median(grown[tenth : 2 * tenth]), statistics.median(grown[-tenth:])
        print(
            f"\nresident memory over {args.growth} asynchronous saves in a row: {first:.0f} MiB early, {last:.0f} MiB at the end"
        )


if __name__ == "__main__":
    main()
