"""The ranks of a run: launch, rendezvous, strategies (DDP, FSDP2, DeepSpeed), watchdog, signals and exit."""
