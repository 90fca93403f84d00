"""Hooks run around the training loop: checkpoints, logging, progress. One small protocol; users add their own."""
