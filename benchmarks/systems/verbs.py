"""Public functions of a fit and cells, as their peak memory is measured; nothing is imported here.

Every function takes the package as its first argument. The process that starts the others only needs the names, and
must stay small.
"""

from collections.abc import Callable
from typing import Any

Verb = Callable[[Any, Any, Any], Any]  # of the package, a fit and cells


def train(ps: Any, fit: Any, cells: Any) -> Any:
    """Fit a new default model for two epochs; more of them need no more memory."""
    return ps.fit(ps.SCVI(cells.n_genes), cells, epochs=2, progress=False)


def mean_rate(ps: Any, fit: Any, cells: Any) -> Any:
    """Draw z and w of every cell and keep the mean of w only: all draws would be 16 GB."""
    return ps.sample_posterior(fit, cells, sites=("z", "w"), reduce=lambda drawn: {"w": drawn["w"].mean(0)})


def differential_expression(ps: Any, fit: Any, cells: Any) -> Any:
    """Compare two groups of some five thousand cells each."""
    return ps.differential_expression(fit, cells, groupby="group", group_a="a", group_b="b")


def quick_leave_one_out(ps: Any, fit: Any, cells: Any) -> Any:
    """Leave out every entry of every cell, with a tenth of the draws and without the search for a proposal."""
    return ps.leave_one_out(fit, cells, samples=100, sampler=ps.Amortized())


def calibrate(ps: Any, fit: Any, cells: Any) -> Any:
    """Calibrate with one batch of simulated cells and short chains, which need no less at a time than long ones."""
    return ps.calibrate(fit, cells.n_cells, sampler=ps.HMC(warmup=5), thin=1)


VERBS: dict[str, Verb] = {
    "fit": train,
    "embed": lambda ps, fit, cells: ps.embed(fit, cells),
    "sample_posterior": lambda ps, fit, cells: ps.sample_posterior(fit, cells),
    "impute": lambda ps, fit, cells: ps.impute(fit, cells),
    "technical_zero_probability": lambda ps, fit, cells: ps.technical_zero_probability(fit, cells),
    "differential_expression": differential_expression,
    "prior_predictive": lambda ps, fit, cells: ps.prior_predictive(fit.model, cells.n_cells),
    "posterior_predictive": lambda ps, fit, cells: ps.posterior_predictive(fit, cells),
    "check_predictions": lambda ps, fit, cells: ps.check_predictions(fit, cells),
    "to_datatree": lambda ps, fit, cells: ps.to_datatree(fit, cells),
    "leave_one_out, 100 amortized draws": quick_leave_one_out,
}
BY_BATCH: dict[str, tuple[Verb, int]] = {  # and the cells of a batch
    "sample_posterior, mean of w": (mean_rate, 64),
    "evidence": (lambda ps, fit, cells: ps.evidence(fit, cells), 64),
    "compare": (lambda ps, fit, cells: ps.compare({"one": fit, "two": fit}, cells), 64),
    "annealed_evidence": (lambda ps, fit, cells: ps.annealed_evidence(fit, cells), 16),
    "leave_one_out": (lambda ps, fit, cells: ps.leave_one_out(fit, cells), 8),
    "calibrate, short chains": (calibrate, 64),
}
