"""Optimizers that optim= chooses: functions of parameter groups, each with rate and decay; their other parameters are keys."""
