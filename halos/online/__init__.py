"""Sample from a policy, label what it says, and walk in rounds: each stage is a command of its own that writes one file."""
