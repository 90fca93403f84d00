"""Sweeps: jobs of one command run in parallel, each on its own devices; they are monitored, stopped and resumed together."""
