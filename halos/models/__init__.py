"""Models as this framework loads them: the policy, its reference, reward models, adapters."""
