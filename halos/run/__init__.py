"""From a checked config to a run: what it is made of, and what it does from its start to its exit status."""

from halos.run.lifecycle import run

__all__ = ["run"]
