"""What gives a sample its score: a function, a reward model, or a judge behind an API."""
