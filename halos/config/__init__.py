"""Configuration of a run: the schema, its validation, and losses, optimizers and hooks bound to their keys."""
