"""The package's version, the one place that names it: the build, saved fits and results read it here."""

__version__ = "0.1.0"
