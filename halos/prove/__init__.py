"""The proof of a run's forward: before the first step its log-probs and scores are compared with those of transformers' own."""
