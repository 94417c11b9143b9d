"""The list of a program's random variables: read off the program, whatever its parts, and without a trace of itself."""

import pyro
import pytest
import torch

import pyro_scvi as ps

GENES = 20
WEIGHTS = {"decoder.*.weight": ps.weights.HorseshoeWeights(), "likelihood.*": ps.weights.HierarchicalWeights()}


def test_the_paper_s_program():
    assert ps.SCVI(GENES, library=ps.libraries.NoLibrary()).sites() == [
        ("z", "Normal", "cells x 10"),
        ("w", "Gamma", "cells x genes"),
        ("y", "Poisson", "cells x genes"),
        ("h", "Bernoulli", "cells x genes"),
        ("x", "a function of those above", "cells x genes"),
    ]


def test_the_marginal_program():
    assert ps.SCVI(GENES, 3, prior=ps.priors.GaussianMixture(3, 4)).sites(marginal=True) == [
        ("z", "mixture of 4 Normal", "cells x 3"),
        ("l", "LogNormal", "cells"),
        ("x", "ZeroInflated NegativeBinomial", "cells x genes"),
    ]


@pytest.mark.parametrize(
    ("prior", "law"),
    [
        (ps.priors.Flat(3), "ImproperUniform"),
        (ps.priors.StudentT(3), "StudentT"),
        (ps.priors.Flow(3), "transformed Normal"),
        (ps.priors.Dirichlet(3), "Dirichlet"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("likelihood", [ps.likelihoods.ZINB, ps.likelihoods.ZIP, ps.likelihoods.Poisson])
def test_every_prior_and_likelihood(prior, law, likelihood):
    sites = {site.name: site for site in ps.SCVI(GENES, 3, prior=prior, likelihood=likelihood()).sites()}
    assert sites["z"].law == law
    assert sites["w"] == (
        "w",
        "Gamma" if likelihood is ps.likelihoods.ZINB else "a function of those above",
        sites["x"].shape,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_with_a_prior_are_sites(dtype):
    likelihood = ps.likelihoods.ZINB(ps.likelihoods.PerGene(GENES))
    model = ps.SCVI(GENES, n_covariates=2, likelihood=likelihood, weight_priors=WEIGHTS).to(dtype)
    sites = {site.name: site for site in model.sites()}
    assert sites["decoder.heads.log_mean.weight.local"].shape == f"{GENES} x 128"
    assert sites["likelihood.dispersion.log_inverse_dispersion.mean"] == (
        "likelihood.dispersion.log_inverse_dispersion.mean",
        "Normal",
        "1",
    )


def test_looking_changes_nothing():
    model = ps.SCVI(GENES)
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    model._repr_html_()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not list(pyro.get_param_store().keys())
    assert model.training


def test_a_notebook_shows_them():
    text = ps.SCVI(GENES)._repr_html_()
    for word in ("parameters to learn", "Gamma", "cells x genes", "<th"):
        assert word in text


def test_a_law_without_an_explicit_program_shows_its_marginal():
    class Geometric(ps.likelihoods.Likelihood):
        heads = ("log_mean",)

        def marginal(self, log_mean):
            return pyro.distributions.Geometric(logits=-log_mean)

    model = ps.SCVI(GENES, likelihood=Geometric())
    assert "Geometric" in model._repr_html_()
