"""Saving to disk without pickle: archives of tensors and JSON."""
