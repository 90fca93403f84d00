"""Readers: from a file of one kind, compressed or not, to its rows, each with its line."""
