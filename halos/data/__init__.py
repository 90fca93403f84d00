"""Data: rows of files -> examples -> token ids, tokenised once and cached by content -> shuffled batches, the same for a seed."""
