"""scVI as a Pyro program: read it, change it, fit it, sample its posterior."""

from pyro_scvi import (
    baselines,
    calibration,
    criticism,
    datasets,
    differential,
    guides,
    imputation,
    libraries,
    likelihoods,
    networks,
    plots,
    presets,
    priors,
    schedules,
    stores,
    weights,
)
from pyro_scvi.annealing import annealed_evidence
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

__version__ = "0.1.0"

__all__ = [
    "HMC",
    "SCVI",
    "Amortized",
    "Cells",
    "Fit",
    "Importance",
    "Refined",
    "Schema",
    "annealed_evidence",
    "baselines",
    "calibrate",
    "calibration",
    "check_predictions",
    "compare",
    "criticism",
    "datasets",
    "differential",
    "differential_expression",
    "embed",
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
    "stores",
    "technical_zero_probability",
    "to_datatree",
    "weights",
]
