#!/usr/bin/env python3
"""Run one Slurm task as one rank: srun python launch/slurm/rank.py ACCELERATE_CONFIG train.py loss=dpo ...

accelerate's own code translates its config into environment variables, Slurm provides the rank, and train.py replaces this
process by execve, so that it receives the signals that Slurm sends to the task.
"""

import os
import signal
import socket
import sys
from collections.abc import Mapping

RANKS = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


def main() -> None:
    # Signals are blocked until train.py can handle them; execve keeps both the signal mask and pending signals
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    config, *command = sys.argv[1:]
    if missing := [name for name in (*RANKS.values(), "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        sys.exit(f"error: {missing[0]} is not set: this runs under srun, from one of launch/slurm/*.sbatch")
    if not os.path.isfile(config):
        sys.exit(f"error: there is no accelerate config {config}")
    ranks = {name: os.environ[source] for name, source in RANKS.items()}
    options = ["--config_file", config, "--num_machines", "1", "--num_processes", ranks["WORLD_SIZE"], "--main_process_port", "0"]
    arguments, defaults, says_precision = _validate_launch_command(launch_command_parser().parse_args([*options, *command]))
    # set as accelerate's own command does: fields that contradict a DeepSpeed file
    fields = [*(defaults.deepspeed_config if defaults else ()), *(["mixed_precision"] if says_precision else [])]
    arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
    environment = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    environment["ACCELERATE_USE_CPU"] = str(bool(arguments.use_cpu))  # which accelerate sets for a single process only
    if not says_precision:  # else its default would look like a request
        environment.pop("ACCELERATE_MIXED_PRECISION", None)
    # accelerate has chosen a port of its own, which the other ranks do not know
    rendezvous = {"MASTER_PORT": os.environ["MASTER_PORT"], **gloo_interface(os.environ)}
    os.execve(sys.executable, [sys.executable, *command], {**environment, **ranks, **rendezvous})


def gloo_interface(environment: Mapping[str, str]) -> dict[str, str]:
    """Return GLOO_SOCKET_IFNAME for the interface that leads to the other hosts. gloo uses the one to which the host's own name
    resolves, which on many systems is the loopback, where no other host can reach it."""
    hosts = environment.get("HALOS_HOSTS", "").split()
    if len(hosts) < 2 or "GLOO_SOCKET_IFNAME" in environment:
        return {}
    other = hosts[1] if environment.get("SLURM_NODEID", "0") == "0" else hosts[0]
    name = interface_to(other)
    return {"GLOO_SOCKET_IFNAME": name} if name is not None else {}


def interface_to(host: str) -> str | None:
    """Return the network interface by which `host` is reached, without sending anything; None where it is unknown."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            mine = probe.getsockname()[0]
    except OSError:
        return None
    import psutil

    return next(
        (name for name, addresses in psutil.net_if_addrs().items() if any(one.address == mine for one in addresses)), None
    )


if __name__ == "__main__":
    main()
