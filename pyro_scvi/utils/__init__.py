"""Utilities without statistics: argument checks, random state, progress bars, HTML reprs."""
