"""The built-in optimizers of optim=: functions of parameter groups (each with lr and weight_decay); other parameters are keys."""
