"""``python -m pyro_scvi``: the same as the console script."""

from pyro_scvi.cli import app

if __name__ == "__main__":
    app(prog_name="python -m pyro_scvi")
