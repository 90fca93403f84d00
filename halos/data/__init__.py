"""Rows of files to token ids: sources -> examples -> tokenised once, cached by content -> batches in a fixed order."""
