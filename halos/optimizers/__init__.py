"""Optimizers that optim= chooses: functions of parameter groups, each with its lr and decay; keyword-only parameters are keys."""
