"""scVI as a Pyro program: read it, change it, fit it, sample its posterior."""

from importlib import import_module
from typing import TYPE_CHECKING

from pyro_scvi import (
    calibration,
    criticism,
    datasets,
    differential,
    distributed,
    errors,
    guides,
    imputation,
    libraries,
    likelihoods,
    networks,
    presets,
    priors,
    schedules,
    shards,
    stores,
    weights,
)
from pyro_scvi.annealing import annealed_evidence
from pyro_scvi.annotate import add_rank_genes_groups, annotate
from pyro_scvi.calibration import calibrate
from pyro_scvi.cells import Cells
from pyro_scvi.comparison import compare
from pyro_scvi.criticism import check_predictions, posterior_predictive, prior_predictive
from pyro_scvi.differential import differential_expression
from pyro_scvi.evidence import evidence
from pyro_scvi.export import to_datatree
from pyro_scvi.fit import Fit, fit
from pyro_scvi.imputation import impute, technical_zero_probability
from pyro_scvi.leave_one_out import leave_one_out
from pyro_scvi.model import SCVI
from pyro_scvi.posterior import embed
from pyro_scvi.samplers import HMC, Amortized, Importance, Refined
from pyro_scvi.sampling import sample_posterior
from pyro_scvi.schema import Schema
from pyro_scvi.sensitivity import prior_sensitivity
from pyro_scvi.store import load
from pyro_scvi.version import __version__ as __version__

if TYPE_CHECKING:
    from pyro_scvi import baselines, plots
else:

    def __getattr__(name):
        """Import a room when it is first asked for: these bring scikit-learn, scipy.stats and matplotlib, 100 MB."""
        if name in ("baselines", "plots"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return [*__all__, "__version__"]


__all__ = [
    "HMC",
    "SCVI",
    "Amortized",
    "Cells",
    "Fit",
    "Importance",
    "Refined",
    "Schema",
    "add_rank_genes_groups",
    "annealed_evidence",
    "annotate",
    "baselines",
    "calibrate",
    "calibration",
    "check_predictions",
    "compare",
    "criticism",
    "datasets",
    "differential",
    "differential_expression",
    "distributed",
    "embed",
    "errors",
    "evidence",
    "fit",
    "guides",
    "imputation",
    "impute",
    "leave_one_out",
    "libraries",
    "likelihoods",
    "load",
    "networks",
    "plots",
    "posterior_predictive",
    "presets",
    "prior_predictive",
    "prior_sensitivity",
    "priors",
    "sample_posterior",
    "schedules",
    "shards",
    "stores",
    "technical_zero_probability",
    "to_datatree",
    "weights",
]
