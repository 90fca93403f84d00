#!/usr/bin/env python3
"""One Slurm task as one process of a run: srun python launch/slurm/rank.py ACCELERATE_CONFIG train.py loss=dpo ...

What the accelerate config asks for is put into the environment by accelerate's own code, Slurm says which rank this is, and
train.py takes this process's place: signals that Slurm sends to the task are its own.
"""

import os
import sys

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

RANKS = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


def main() -> None:
    config, *command = sys.argv[1:]
    if missing := [name for name in (*RANKS.values(), "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        sys.exit(f"error: {missing[0]} is not set: this runs under srun, from one of launch/slurm/*.sbatch")
    if not os.path.isfile(config):
        sys.exit(f"error: there is no accelerate config {config}")
    ranks = {name: os.environ[source] for name, source in RANKS.items()}
    words = ["--config_file", config, "--num_machines", "1", "--num_processes", ranks["WORLD_SIZE"], "--main_process_port", "0"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([*words, *command]))
    if arguments.use_deepspeed:
        sys.exit(f"error: {config} asks for DeepSpeed, which is not supported: use launch/accelerate/fsdp2.yaml")
    environment = prepare_multi_gpu_env(arguments)
    port = os.environ["MASTER_PORT"]  # accelerate has just chosen one of its own, which the other ranks do not know
    os.execve(sys.executable, [sys.executable, *command], {**environment, **ranks, "MASTER_PORT": port})


if __name__ == "__main__":
    main()
