"""Held-out evidence, speed and memory of this package beside its peers; not part of the installed package."""
