"""What a run may be told: the schema, the gate that checks it, and losses bound to their keys."""
