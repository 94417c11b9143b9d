"""The command ``de``: differential expression between groups of cells, by a saved fit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from anndata import AnnData

from pyro_scvi.analysis.differential import (
    EveryOther,
    GroupMeans,
    RandomPairs,
    TheRest,
    Uncorrected,
    differential_expression,
)
from pyro_scvi.cli import genes
from pyro_scvi.cli.files import QueryOptions, column, load_fit, read_h5ad, write_csv
from pyro_scvi.cli.genes import REST, Comparison
from pyro_scvi.cli.messages import say
from pyro_scvi.cli.options import (
    AllowNonInteger,
    Device,
    Fill,
    FitFolder,
    Force,
    Input,
    QueryLayer,
    Raw,
    Sampling,
    Seed,
    called,
)
from pyro_scvi.cli.page import versions
from pyro_scvi.cli.workspace import PAGE, Workspace, new_file, new_folder
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.export import html_page
from pyro_scvi.inference.samplers import Amortized
from pyro_scvi.training.fitted import Fit

MOST_GROUPS = 100  # each against the rest; a column with more of them names no cell types


def de(
    ctx: typer.Context,
    fit_folder: FitFolder,
    file: Input,
    groupby: Annotated[str, typer.Option(metavar="COLUMN", help="Column of obs with the groups.")],
    out: Annotated[Path, typer.Option(metavar="DIR|OUT.csv", help="Folder for table and page, or the table alone.")],
    group_a: Annotated[
        str | None, typer.Option(metavar="A", help="A group.", show_default="each group in turn")
    ] = None,
    group_b: Annotated[
        str | None, typer.Option(metavar="B", help="The group to compare it with.", show_default="all other cells")
    ] = None,
    replicates: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of obs with donors; errors are those between them.")
    ] = None,
    every_other: Annotated[
        bool, typer.Option("--every-other", help="Compare with each other group; the weakest comparison counts.")
    ] = False,
    within_batch: Annotated[bool, typer.Option("--within-batch", help="Compare cells of the same batch only.")] = False,
    min_detected: Annotated[
        float | None, typer.Option(min=0, help="Lowest share of a group's cells with the gene.", show_default="0.02")
    ] = None,
    min_molecules: Annotated[
        float | None, typer.Option(min=0, help="Fewest molecules of a gene that is tested.", show_default="10")
    ] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Compare random pairs of cells, as the paper does.")] = False,
    depth_laden: Annotated[
        bool, typer.Option("--depth-laden", help="With --pairs: compare w itself, not w over the cell's depth.")
    ] = False,
    delta: Annotated[
        float | None,
        typer.Option(min=0, help="With --pairs: log2 fold changes beyond this count as changes.", show_default="0.5"),
    ] = None,
    layer: QueryLayer = None,
    raw: Raw = False,
    fill_missing_genes: Fill = False,
    allow_non_integer: AllowNonInteger = False,
    sampler: Sampling = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Find the genes that differ between groups of cells of FILE.h5ad, by a saved fit.

    Compares the mean of group A with that of group B, or of all other cells, or each group in turn with all other
    cells. DIR/table.csv holds every gene, DIR/index.html shows the first ones, DIR/volcano.png two groups compared.
    Fold changes are log2 of A over B: positive ones are higher in A.
    """
    of_means = {"replicates": replicates, "min_detected": min_detected, "min_molecules": min_molecules}
    of_pairs = {"delta": delta, "contrast": Uncorrected() if depth_laden else None}
    _require_one_question(pairs, of_means | {"every_other": every_other or None}, of_pairs)
    drawing: dict[str, Any] = {"sampler": (sampler or Amortized)()}
    estimand: GroupMeans | RandomPairs = (
        RandomPairs(within_batch=within_batch, **drawing, **_given(of_pairs))
        if pairs
        else GroupMeans(within_batches=within_batch, **drawing, **_given(of_means))
    )
    against = EveryOther() if every_other else TheRest()
    request = Request(groupby, group_a, group_b, estimand, against, seed)
    reading = QueryOptions(layer, raw, fill_missing_genes, allow_non_integer)

    def compute() -> Result:
        return _compare(load_fit(fit_folder, device), read_h5ad(file), request, reading)

    if out.suffix == ".csv":
        with new_file(out, force, file, fit=fit_folder) as space:
            write_csv(compute().table, space.path)
        return
    with new_folder(out, ("table.csv",), force, file, fit_folder) as space:
        result = compute()
        write_csv(result.table, space.path / "table.csv")
        source = f"{file.name} by the fit {fit_folder}"
        page = html_page.page(f"pyro-scvi: {file.name}", _sections(space, request, result, source, called(ctx)))
        (space.path / PAGE).write_text(page, encoding="utf-8")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user named; the others keep the defaults of the library."""
    return {name: value for name, value in options.items() if value is not None}


def _require_one_question(pairs: bool, of_means: dict[str, Any], of_pairs: dict[str, Any]) -> None:
    """Refuse options of the one question beside the other."""
    if pairs and _given(of_means):
        raise ModelError(
            "--replicates, --every-other, --min-detected and --min-molecules are for means of groups; leave out these, "
            "or --pairs"
        )
    if not pairs and _given(of_pairs):
        raise ModelError("--depth-laden and --delta are for pairs of cells; leave them out, or add --pairs")


@dataclass(frozen=True)
class Request:
    """Which groups of which column are compared, and how."""

    groupby: str
    group_a: str | None
    group_b: str | None
    estimand: GroupMeans | RandomPairs
    against: TheRest | EveryOther
    seed: int

    @property
    def question(self) -> genes.OfMeans | genes.OfPairs:
        """What a call says."""
        return genes.OfPairs(self.estimand.delta) if isinstance(self.estimand, RandomPairs) else genes.OfMeans()


@dataclass(frozen=True)
class Result:
    """The table of all comparisons, and each of them."""

    table: pd.DataFrame
    comparisons: list[Comparison]


def _compare(fit: Fit, adata: AnnData, request: Request, reading: QueryOptions) -> Result:
    labels = genes.named(column(adata.obs, request.groupby, "--groupby"))
    a, b = (genes.typed(labels, group) for group in (request.group_a, request.group_b))
    n_groups = pd.Series(labels).nunique()
    if request.group_a is None and n_groups > MOST_GROUPS:
        raise DataError(
            f"column {request.groupby!r} has {n_groups:,} groups, too many to compare each with the rest; "
            "name one or two by --group-a and --group-b, or take another column"
        )
    cells = reading.cells_of(fit, adata)
    say(f"comparing {cells.n_cells:,} cells x {cells.n_genes:,} genes by {request.groupby}")
    table = differential_expression(
        fit,
        cells,
        groupby=labels,
        group_a=a,
        group_b=b,
        against=request.against,
        estimand=request.estimand,
        seed=request.seed,
    )
    if a is None:
        tables = {str(group): part.droplevel("group") for group, part in table.groupby(level="group", sort=False)}
    else:
        tables = {a: table}
    return Result(table, [genes.compared(part, labels, of, b, request.question) for of, part in tables.items()])


def _sections(space: Workspace, request: Request, result: Result, source: str, command: str) -> list[html_page.Section]:
    asked = {"estimand": request.estimand, "against": request.against, "seed": request.seed}
    options = [(name, f"{value}") for name, value in asked.items()]
    made = [
        f"The cells of {source}; table.csv holds every gene.",
        html_page.code(command),
        html_page.table([("column", request.groupby), *options]),
    ]
    return [*_shown(space, request.groupby, result), ("How it was made", [*made, versions(), *space.notes])]


def _shown(space: Workspace, groupby: str, result: Result) -> list[html_page.Section]:
    comparison, *others = result.comparisons
    if others:
        text = f"Each group of {groupby} against {REST} of {comparison.n_a + comparison.n_b:,} cells."
        return [
            ("", [text, f"Genes are called for {comparison.question.criterion}."]),
            ("Genes by group", [genes.by_group(result.comparisons)]),
        ]
    return [
        ("", [f"By {groupby}: {genes.sides(comparison)}", genes.volcano(comparison, space.path / "volcano.png")]),
        ("Numbers", [html_page.table(genes.counted(comparison), ("quantity", "value", ""), numbers=[1])]),
        ("First genes", [genes.top(comparison, 25), genes.legend(comparison)]),
    ]
