"""Scorers of samples: reward functions, a reward model, or a judge behind an API."""
