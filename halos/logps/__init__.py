"""From a model and packed sequences to the log-probs or scores that a loss takes: the hot path of every loss."""
