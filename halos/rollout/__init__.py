"""Completions sampled from a policy, scored, and made into what a loss learns from: engines, scorers, rewards, feedback."""
