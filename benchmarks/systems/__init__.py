"""The systems compared: models of this package, scvi-tools, plain Pyro, and what any of them is measured against."""
