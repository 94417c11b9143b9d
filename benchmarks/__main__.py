"""``python -m benchmarks cpu``, ``gpu`` (this package beside scvi-tools) and ``truth`` (checks of inference)."""

from benchmarks.cli import main

if __name__ == "__main__":
    main()
