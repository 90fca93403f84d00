#!/usr/bin/env python3
"""One Slurm task as one process of a run: srun python launch/slurm/rank.py ACCELERATE_CONFIG train.py loss=dpo ...

What the accelerate config asks for is put into the environment by accelerate's own code, Slurm says which rank this is, and
train.py takes this process's place: signals that Slurm sends to the task are its own.
"""

import os
import signal
import socket
import sys
from collections.abc import Mapping

RANKS = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


def main() -> None:
    # A signal that comes while we or train.py still start is held back until train.py can answer it: execve changes neither
    # what is held back nor what has come
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    config, *command = sys.argv[1:]
    if missing := [name for name in (*RANKS.values(), "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        sys.exit(f"error: {missing[0]} is not set: this runs under srun, from one of launch/slurm/*.sbatch")
    if not os.path.isfile(config):
        sys.exit(f"error: there is no accelerate config {config}")
    ranks = {name: os.environ[source] for name, source in RANKS.items()}
    words = ["--config_file", config, "--num_machines", "1", "--num_processes", ranks["WORLD_SIZE"], "--main_process_port", "0"]
    arguments, defaults, says_precision = _validate_launch_command(launch_command_parser().parse_args([*words, *command]))
    # accelerate's own command sets this apart from the rest: what stands beside a DeepSpeed file and contradicts it
    fields = [*(defaults.deepspeed_config if defaults else ()), *(["mixed_precision"] if says_precision else [])]
    arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
    environment = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    environment["ACCELERATE_USE_CPU"] = str(bool(arguments.use_cpu))  # which accelerate hands to a single process only
    if not says_precision:  # else its own default would pass for a wish
        environment.pop("ACCELERATE_MIXED_PRECISION", None)
    # accelerate has just chosen a port of its own, which the other ranks do not know
    meeting = {"MASTER_PORT": os.environ["MASTER_PORT"], **gloo_interface(os.environ)}
    os.execve(sys.executable, [sys.executable, *command], {**environment, **ranks, **meeting})


def gloo_interface(environment: Mapping[str, str]) -> dict[str, str]:
    """The network interface that leads to the other hosts. gloo takes the one that the host's own name means, which is the
    loopback on many systems, and then offers an address at which nobody can reach it."""
    hosts = environment.get("HALOS_HOSTS", "").split()
    if len(hosts) < 2 or "GLOO_SOCKET_IFNAME" in environment:
        return {}
    other = hosts[1] if environment.get("SLURM_NODEID", "0") == "0" else hosts[0]
    name = interface_to(other)
    return {"GLOO_SOCKET_IFNAME": name} if name is not None else {}


def interface_to(host: str) -> str | None:
    """By which network interface `host` is reached; None where that cannot be told. Nothing is sent."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            mine = probe.getsockname()[0]
    except OSError:
        return None
    import psutil

    return next((name for name, given in psutil.net_if_addrs().items() if any(one.address == mine for one in given)), None)


if __name__ == "__main__":
    main()
