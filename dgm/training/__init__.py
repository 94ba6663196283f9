"""Training: the loop, engines, state, checkpoints, tracking."""
