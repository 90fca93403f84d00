"""Before the first step a run shows that its log-probs and scores are the model's own."""
