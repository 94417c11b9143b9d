"""The table of all checks: each row says what would have made it fail, and whether it did."""

import sys
import time
import warnings
from collections.abc import Callable

import pandas as pd

import pyro_scvi as ps
from benchmarks.truth import diagnostics, formulas, posteriors, separated
from benchmarks.truth.finding import Finding
from benchmarks.truth.fits import line_fit, real, trained

Check = Callable[[], list[Finding]]


def rows_of(n_cells: int) -> list[Check]:
    """The checks, most with so many cells."""
    line, simulated = line_fit(), trained()
    fits = {"simulated": simulated, **real()}
    checks: list[Check] = [
        formulas.law,
        lambda: formulas.counts_drawn(1000 * n_cells),
        formulas.conditionals,
        formulas.pairs,
        formulas.priors,
        formulas.weight_priors,
        lambda: posteriors.evidence(line),
        lambda: posteriors.comparison(line, n_cells // 2),
        lambda: posteriors.effective_draws(line),
        lambda: posteriors.left_out(line),
        lambda: posteriors.technical_zeros(line),
        lambda: separated.modes(n_cells // 4),
        lambda: diagnostics.calibration(line, 6 * n_cells),
        lambda: diagnostics.sensitivity(line),
        lambda: diagnostics.checks(simulated, n_cells),
    ]
    return checks + [check for name, fit in fits.items() for check in _on(fit, name, n_cells)]


def _on(fit: ps.Fit, name: str, n_cells: int) -> list[Check]:
    """Intervals and ranks of cells simulated from one fit."""
    return [
        lambda: posteriors.intervals(fit, name, n_cells),
        lambda: posteriors.ranks(fit, name, n_cells),
    ]


def table_of(n_cells: int) -> pd.DataFrame:
    """Run all checks; progress goes to the error stream."""
    found = list[Finding]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of k-hat, which the rows count
        for row in rows_of(n_cells):
            started = time.perf_counter()
            found += row()
            sys.stderr.write(f"{found[-1].check}: {time.perf_counter() - started:.0f} s\n")
    return pd.DataFrame(found).assign(holds=[row.error < row.limit for row in found])


def printed(table: pd.DataFrame) -> str:
    """The table in Markdown."""
    lines = ["| check | reference | result | error | fails if | holds |", "|---|---|---|---|---|---|"]
    for row in table.itertuples():
        held = "yes" if row.holds else "**no**"
        cells = row.check, row.reference, row.result, f"{row.error:.2g}", row.fails_if, held
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
