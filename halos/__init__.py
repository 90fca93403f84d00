"""Align language models: one loss function, one YAML, one command; checkpoints that resume exactly."""

__version__ = "0.1.0"
