"""Evidence log p(x): importance sampling, annealing, leave-one-out, and comparison of models."""
