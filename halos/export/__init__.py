"""Export of a checkpoint or FINAL for others: merged, adapter or full model, as a directory on this disk or on the hub."""
