"""The systems compared: models of this package, scvi-tools, plain Pyro, and lower limits of their cost."""
