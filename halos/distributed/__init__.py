"""The processes of a run: how they start and meet, share a model, watch each other, and end."""
