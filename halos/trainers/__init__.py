"""The training loop: micro-batches, the loss over a global batch, evaluation, skipped steps; policy gradients on rollouts."""
