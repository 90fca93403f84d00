"""Checkpoints: written so that none can be lost, selected for a resume, verified, pruned and exported."""
