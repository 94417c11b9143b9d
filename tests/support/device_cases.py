"""What is run on pretended devices: fits that have every prior, likelihood and guide, and every verb."""

import numpy as np
import pandas as pd
from anndata import AnnData

import pyro_scvi as ps
from tests.support.simulate import simulated_counts

N_CELLS, N_GENES, N_LATENT = 12, 8, 3
COUNTS = simulated_counts(N_CELLS, N_GENES)
CELLS = ps.Cells.from_counts(COUNTS)
OBS = pd.DataFrame({"size": np.linspace(0.5, 2, N_CELLS)}, index=[f"cell_{i}" for i in range(N_CELLS)])
SIZED = ps.Cells.from_anndata(AnnData(COUNTS, obs=OBS), size_factor="size")
FEW, QUICK = CELLS.take(range(2)), ps.Importance(steps=2, rounds=1, proposals=20)
LIBRARIES = {
    "ObservedLibrary": (ps.libraries.ObservedLibrary, CELLS),
    "SizeFactor": (lambda: ps.libraries.SizeFactor(SIZED.columns["size"]), SIZED),
}
CHAINS = ps.HMC(chains=2, warmup=1, steps=1, rounds=0, leapfrog=2, least=4)
PAIR = {"groupby": np.arange(N_CELLS) % 2, "group_a": 0, "group_b": 1}
FITS = [
    ("StandardNormal", "ZINB", "DiagonalNormal"),
    ("ARDNormal", "NB", "FullRankNormal"),
    ("StudentT", "ZIP", "InverseAutoregressiveFlow"),
    ("Laplace", "Poisson", "PerCell"),
    ("GaussianMixture", "NB", "DiagonalNormal"),
    ("VampPrior", "ZINB", "FullRankNormal"),
    ("Flow", "ZIP", "DiagonalNormal"),
    ("LogisticNormal", "Poisson", "DiagonalNormal"),
    ("Dirichlet", "ZINB", "InverseAutoregressiveFlow"),
    ("Flat", "ZINB", "Point"),
]


def draws(sampler, samples=4):
    names = ("z", "l", "w", "y", "h")
    return lambda fit: ps.sample_posterior(fit, FEW, samples=samples, sites=names, sampler=sampler, progress=False)


def exported(fit):
    everything = {"log_likelihood": True, "posterior_predictive": True, "prior_predictive": True}
    return ps.to_datatree(fit, FEW, samples=2, sampler=QUICK, **everything).posterior


VERBS = {
    "embed": lambda fit: ps.embed(fit, CELLS),
    "prior_predictive": lambda fit: ps.prior_predictive(fit.model, 5),
    "draws of the guide": draws(ps.Amortized()),
    "draws of a refined guide": draws(ps.Refined(steps=2)),
    "weighted draws": draws(QUICK),
    "chains": draws(CHAINS),
    "evidence": lambda fit: ps.evidence(fit, FEW, samples=20, steps=2, rounds=1, progress=False),
    "annealed_evidence": lambda fit: ps.annealed_evidence(
        fit, FEW, chains=2, temperatures=2, leapfrog=1, progress=False
    ),
    "leave_one_out": lambda fit: ps.leave_one_out(fit, FEW, samples=30, sampler=QUICK, progress=False),
    "impute": lambda fit: ps.impute(fit, CELLS, samples=3),
    "quantiles": lambda fit: ps.impute(fit, CELLS, samples=3, sampler=ps.Refined(steps=2), quantiles=(0.1, 0.9)),
    "technical_zero_probability": lambda fit: ps.technical_zero_probability(fit, CELLS, samples=3),
    "differential_expression": lambda fit: ps.differential_expression(fit, CELLS, **PAIR),
    "pairs": lambda fit: ps.differential_expression(
        fit, CELLS, **PAIR, estimand=ps.differential.RandomPairs(most_pairs=100)
    ),
    "differential_abundance": lambda fit: ps.differential_abundance(
        fit, CELLS, np.arange(N_CELLS) % 2, np.arange(N_CELLS) % 4
    ),
    "normalized_expression": lambda fit: ps.normalized_expression(fit, CELLS, samples=3),
    "posterior_predictive": lambda fit: ps.posterior_predictive(fit, CELLS, samples=2),
    "check_predictions": lambda fit: ps.check_predictions(fit, CELLS, samples=4).genes["mean"],
    "calibrate": lambda fit: ps.calibrate(fit, 2, sampler=ps.Amortized(), draws=19, thin=1, progress=False).ranks,
    "to_datatree": exported,
}
OF_OTHERS = {  # what asks a prior for its density and for draws
    prior: ["embed", "impute"] if prior == "Flat" else ["evidence"] if guide == "PerCell" else ["draws of the guide"]
    for prior, _, guide in FITS[1:]
}
WITHOUT_FLOAT64 = [
    "draws of the guide",
    "chains",
    "evidence",
    "annealed_evidence",
    "leave_one_out",
    "check_predictions",
    "differential_expression",
    "differential_abundance",
]
