"""A save as a directory for others: merged, adapter or whole model, on this disk or on the hub."""
