"""Many runs from one command: jobs side by side, each with devices of its own, watched, stopped and taken up again."""
