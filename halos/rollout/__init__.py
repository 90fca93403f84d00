"""Completions sampled from a policy, scored, and turned into training data: sampling engines, scorers, rewards, feedback."""
