"""Data: rows of files -> examples -> token ids, tokenised once and cached by content -> batches in a fixed order."""
