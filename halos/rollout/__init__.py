"""Sampling from a policy, scoring the samples, and making training data of them: sampling engines, scorers, rewards, feedback."""
