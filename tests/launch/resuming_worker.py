"""A rank that trains cells one after the other to their end, and each again from the checkpoint before its end.

torchrun tests/launch/resuming_worker.py OUTPUT CELL [CELL ...], a cell being overrides joined with blanks.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from halos.cli.compose import ConfigTree
from halos.cli.overrides import parse
from halos.cli.resume import load_run
from halos.config.resume_policy import Change
from halos.config.schema import Config
from halos.distributed.children import exit_process
from halos.distributed.launch import make_accelerator
from halos.run.assemble import assemble
from tests.composed import config_of

torch.set_num_threads(1)


def train(config: Config, changed: Sequence[Change] = ()) -> None:
    trainer = assemble(config, [], make_accelerator(config.train.precision, config.model.dtype), changed)
    assert trainer is not None
    trainer.fit()
    dist.barrier()


def main() -> None:
    output, *cells = sys.argv[1:]
    for number, cell in enumerate(cells):
        config = config_of(*cell.split(), f"exp_name=whole{number}", f"output_root={output}")
        train(config)
        again = Path(output) / f"resumed{number}"
        if dist.get_rank() == 0:
            shutil.copytree(config.run_dir, again)
            for gone in ("FINAL", "checkpoints/step-00000005"):
                shutil.rmtree(again / gone, ignore_errors=True)
        dist.barrier()
        tree = ConfigTree()
        cache = [parse(word, tree.choices) for word in cell.split() if word.startswith("cache_dir=")]
        train(*load_run(str(again), cache, tree))


if __name__ == "__main__":
    main()
    exit_process(0)
