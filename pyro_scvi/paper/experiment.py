"""An experiment: the steps, rows and pictures of one table or figure of the paper."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyro_scvi.paper.budget import Budget
from pyro_scvi.paper.rows import Row
from pyro_scvi.paper.steps import Results, Step
from pyro_scvi.paper.summary import Finding


@dataclass(frozen=True)
class Picture:
    """A picture: its PNG file, its alternative text, and its caption."""

    file: Path
    alt: str
    caption: str


def no_pictures(results: Results, budget: Budget, folder: Path) -> list[Picture]:
    """For experiments without a picture."""
    return []


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper.

    Attributes
    ----------
    name, title
        Name for the command line, and heading.
    text
        Paragraphs: what is compared, what differs from the paper and why.
    steps
        The steps to compute.
    rows
        The numbers, made of the outcomes of the steps.
    pictures
        Function that draws the pictures into a folder.
    claim, findings
        What the paper says, and what was found: the report opens with these. "" for neither.
    """

    name: str
    title: str
    text: Sequence[str]
    steps: Callable[[Budget], list[Step]]
    rows: Callable[[Results, Budget], list[Row]]
    pictures: Callable[[Results, Budget, Path], list[Picture]] = no_pictures
    claim: str = ""
    findings: Sequence[Finding] = ()
