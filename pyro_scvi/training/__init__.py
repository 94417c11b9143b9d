"""Training: fit, its options and loop, checkpoints, several processes, and the resulting Fit."""
