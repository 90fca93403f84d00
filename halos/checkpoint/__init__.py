"""Checkpoints: how they are written so that none can be lost, found again, verified, merged and handed over."""
