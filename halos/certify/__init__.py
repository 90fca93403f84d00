"""Proof of a loss, ours or a user's, without a model: its invariances, its cost, and what its worked numbers hold."""
