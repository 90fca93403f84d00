"""From a checked config to a run: the composition root."""

from halos.build.session import run

__all__ = ["run"]
