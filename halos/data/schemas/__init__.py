"""Schemas of rows that are told by their columns: each is turned into the columns of a built-in form."""
