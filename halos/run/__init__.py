"""From a checked config to a run: its models, data and optimizer, and its life from start to exit status."""

from halos.run.lifecycle import run

__all__ = ["run"]
