"""From a model and packed sequences to the log-probs or scores that a loss eats: the hot path, used by every loss."""
