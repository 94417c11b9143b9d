"""Inference with a model and its guide: the evidence bound, importance sampling, HMC, compiled steps."""
