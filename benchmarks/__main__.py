"""``python -m benchmarks cpu`` and ``python -m benchmarks gpu``: this package beside scvi-tools; see ``--help``."""

from benchmarks.cli import main

if __name__ == "__main__":
    main()
