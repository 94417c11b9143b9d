"""The page of a fit: its sections, its settings, how it was made and how to go on."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pyro_scvi.cli import fit_report
from pyro_scvi.cli.fit_report import EvaluatedFit
from pyro_scvi.cli.wording import on_the_command_line
from pyro_scvi.export import html_page
from pyro_scvi.training.fitted import Fit
from pyro_scvi.utils.checks import warn
from pyro_scvi.version import __version__


@dataclass(frozen=True)
class Job:
    """Settings of a command other than data and model."""

    title: str
    source: str
    table: str
    labels: str | None
    pair: tuple[str, str] | None
    command: str
    seed: int
    training: dict[str, Any]


def summary(job: Job, fit: Fit) -> str:
    """A sentence on what was fitted."""
    model, n_cells = fit.model, fit.settings["n_cells"]
    return (
        f"scVI with {type(model.likelihood).__name__} counts, {model.n_latent} latents and the guide "
        f"{type(fit.guide).__name__} was fitted to {n_cells:,} of {job.source}; the others were held out."
    )


def results(job: Job, evaluated: EvaluatedFit, folder: Path) -> list[html_page.Section]:
    """Sections with the fit's results; their pictures and tables are written into the folder."""
    parts: dict[str, Callable[[], list[str]]] = {"Numbers": lambda: [fit_report.numbers(evaluated)]}
    if (pair := job.pair) is not None and (labels := evaluated.labels) is not None:
        parts["Genes that differ"] = lambda: fit_report.differing_genes(evaluated, labels, pair, folder)
    parts |= {
        "Data beside simulated data": lambda: fit_report.predictions(evaluated, folder),
        "Zeros": lambda: fit_report.zeros(evaluated),
        "Model and training": lambda: [fit_report.training(evaluated, folder)],
    }
    return [(heading, made_or_told(heading, make)) for heading, make in parts.items()]


def made_or_told(name: str, make: Callable[[], list[str]]) -> list[str]:
    """A part of the page; where it fails, a sentence that says so, and a warning: a page must not cost a fit."""
    try:
        return make()
    except OSError:  # a full disk: the rest of the page would fail as well
        raise
    except Exception as error:
        text = f"{name} could not be shown: {on_the_command_line(str(error))[:300] or type(error).__name__}"
        warn(text)
        return [text]


def making(job: Job, settings: dict[str, Any]) -> list[html_page.Section]:
    """Sections on how the fit was made and how to go on."""
    start = 'import pyro_scvi as ps\n\nfit = ps.load("fit")'
    kept = f"{job.table} holds the cells with their embedding; the fit is in the folder fit:"
    return [
        ("Settings", [html_page.table([(name.replace("_", " "), f"{value}") for name, value in settings.items()])]),
        ("How it was made", [html_page.code(job.command), versions()]),
        ("Going on", [kept, html_page.code(start)]),
    ]


def settings_of(fit: Fit, job: Job) -> dict[str, Any]:
    """How the fit was made, in values that h5ad and a page can hold."""
    model, schema = fit.model, fit.schema
    return {
        "n_latent": model.n_latent,
        "prior": repr(model.prior),
        "likelihood": repr(model.likelihood),
        "library": repr(model.library),
        "guide": type(fit.guide).__name__,
        "layer": "raw" if schema.raw else schema.layer or "X",
        "batch": schema.batch or "none",
        "covariates": ", ".join(schema.covariates) or "none",
        "seed": job.seed,
        "epochs": fit.settings["epochs"],
        "batch_size": fit.settings["batch_size"],
        "training_cells": fit.settings["n_cells"],
        "device": str(fit.device),
    }


def versions() -> str:
    """Versions of the packages used."""
    packages = [f"pyro-scvi {__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "pyro-ppl", "numpy", "anndata", "scanpy"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # scanpy is optional
            continue
    return ", ".join(packages)
