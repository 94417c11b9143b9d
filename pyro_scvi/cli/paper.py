"""The command ``paper``: make the paper's tables and figures again."""

from pathlib import Path
from typing import Annotated

import typer

from pyro_scvi.cli.options import Progress
from pyro_scvi.cli.page import versions
from pyro_scvi.cli.workspace import STEPS, resumable_folder
from pyro_scvi.paper import report
from pyro_scvi.paper.budget import FULL, QUICK
from pyro_scvi.paper.data import files
from pyro_scvi.paper.experiments import EXPERIMENTS
from pyro_scvi.paper.steps import Results

ALL = "all"


def _known(name: str) -> str:
    if name not in (*EXPERIMENTS, ALL):
        raise typer.BadParameter(f"{name!r} is not one of {', '.join((*EXPERIMENTS, ALL))}.")
    return name


def paper(
    name: Annotated[
        str, typer.Argument(metavar="NAME", callback=_known, help=f"One of {', '.join((*EXPERIMENTS, ALL))}.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results; a run continues what is in it.")],
    quick: Annotated[bool, typer.Option("--quick", help="Few cells and epochs: a test in minutes.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Steps at a time, one thread each; one in a quick run.")] = 1,
    progress: Progress = True,
) -> None:
    """Make tables and figures of Lopez et al. (2017) again; open DIR/index.html afterwards.

    The counts are read from the folder that PYRO_SCVI_DATA names. Every step is kept in DIR/steps, by a hash of its
    code, settings and data, so that an interrupted run continues. DIR/report.md says the same as the page, DIR/rows.csv
    and DIR/rows.json hold every number.
    """
    budget = QUICK if quick else FULL
    chosen = list(EXPERIMENTS.values()) if name == ALL else [EXPERIMENTS[name]]
    with resumable_folder(out, report.FILES, files.folder()) as space:
        results = Results(out / STEPS, isolated=budget.isolated, limit=budget.limit, jobs=jobs, progress=progress)
        results.compute(step for experiment in chosen for step in experiment.steps(budget))
        report.write(chosen, results, budget, space.path, versions())
