"""scVI as a Pyro program: read it, change it, fit it, sample its posterior."""

from typing import TYPE_CHECKING

from pyro_scvi.utils.unloaded import imported, names_to_check
from pyro_scvi.version import __version__ as __version__

if TYPE_CHECKING:
    from pyro_scvi import baselines, errors, guides, likelihoods, plots, presets, priors, schedules
    from pyro_scvi import nn as networks
    from pyro_scvi.analysis import differential
    from pyro_scvi.analysis.abundance import differential_abundance
    from pyro_scvi.analysis.differential import differential_expression
    from pyro_scvi.analysis.evidence.annealed import annealed_evidence
    from pyro_scvi.analysis.evidence.comparison import compare
    from pyro_scvi.analysis.evidence.evidence import evidence
    from pyro_scvi.analysis.evidence.leave_one_out import leave_one_out
    from pyro_scvi.analysis.evidence.stacking import stacking_weights
    from pyro_scvi.analysis.global_posterior import sample_globals
    from pyro_scvi.analysis.integration import spaces
    from pyro_scvi.analysis.integration.embedding import embed
    from pyro_scvi.analysis.integration.expression import normalized_expression
    from pyro_scvi.analysis.integration.labels import predict_labels
    from pyro_scvi.analysis.integration.mapping import map_query
    from pyro_scvi.analysis.integration.transfer import transfer_labels
    from pyro_scvi.analysis.loadings import loadings
    from pyro_scvi.analysis.log_density import log_density
    from pyro_scvi.analysis.posterior_samples import sample_posterior
    from pyro_scvi.analysis.predictive import calibration, imputation
    from pyro_scvi.analysis.predictive import checks as criticism
    from pyro_scvi.analysis.predictive.calibration import calibrate
    from pyro_scvi.analysis.predictive.checks import check_predictions, posterior_predictive, prior_predictive
    from pyro_scvi.analysis.predictive.global_calibration import calibrate_globals
    from pyro_scvi.analysis.predictive.imputation import impute, technical_zero_probability
    from pyro_scvi.analysis.prior_sensitivity import prior_sensitivity
    from pyro_scvi.data import datasets, stores
    from pyro_scvi.data.cells import Cells
    from pyro_scvi.data.schema import Schema
    from pyro_scvi.export import blocks as shards
    from pyro_scvi.export.arviz import to_datatree
    from pyro_scvi.export.scanpy import add_rank_genes_groups, annotate
    from pyro_scvi.inference import importance_weighted as elbos
    from pyro_scvi.inference.given import Given
    from pyro_scvi.inference.samplers import HMC, Amortized, Importance, Refined
    from pyro_scvi.likelihoods import library_size as libraries
    from pyro_scvi.model import SCVI
    from pyro_scvi.priors import weights
    from pyro_scvi.training import distributed
    from pyro_scvi.training.fit import fit
    from pyro_scvi.training.fitted import Fit
    from pyro_scvi.training.loading import load
else:
    # Each name above is imported when it is first asked for: all of them, with torch and anndata, take seconds.
    _HOMES = names_to_check(__file__)

    def __getattr__(name):
        """Import what is first asked for."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = imported(*_HOMES[name])
        return value

    def __dir__():
        return [*__all__, "__version__"]


__all__ = [
    "HMC",
    "SCVI",
    "Amortized",
    "Cells",
    "Fit",
    "Given",
    "Importance",
    "Refined",
    "Schema",
    "add_rank_genes_groups",
    "annealed_evidence",
    "annotate",
    "baselines",
    "calibrate",
    "calibrate_globals",
    "calibration",
    "check_predictions",
    "compare",
    "criticism",
    "datasets",
    "differential",
    "differential_abundance",
    "differential_expression",
    "distributed",
    "elbos",
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
    "loadings",
    "log_density",
    "map_query",
    "networks",
    "normalized_expression",
    "plots",
    "posterior_predictive",
    "predict_labels",
    "presets",
    "prior_predictive",
    "prior_sensitivity",
    "priors",
    "sample_globals",
    "sample_posterior",
    "schedules",
    "shards",
    "spaces",
    "stacking_weights",
    "stores",
    "technical_zero_probability",
    "to_datatree",
    "transfer_labels",
    "weights",
]
