"""The list of a program's random variables: read off the program, whatever its parts, and without a trace of itself."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.discovery import Kind, discovered
from pyro_scvi.errors import ModelError
from tests.support.programs import KINDS, made

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


# --- kinds ---


def kinds_of(model, **options):
    return {site.name: site.kind for site in model.discovered(**options)}


def test_the_kinds_of_the_paper_s_program():
    model = ps.SCVI(GENES, weight_priors={"decoder.heads.log_mean.weight": ps.weights.ARDWeights()})
    assert kinds_of(model, marginal=False) == {
        "decoder.heads.log_mean.weight.scale": Kind.GLOBAL,
        "decoder.heads.log_mean.weight": Kind.GLOBAL,
        "z": Kind.LOCAL,
        "l": Kind.LOCAL,
        "w": Kind.PER_GENE,
        "y": Kind.PER_GENE,
        "h": Kind.PER_GENE,
        "x": Kind.OBSERVED,
    }
    assert list(kinds_of(ps.SCVI(GENES))) == ["z", "l", "x"]
    explicit = ps.SCVI(GENES, likelihood=ps.likelihoods.Poisson(), library=ps.libraries.NoLibrary())
    assert kinds_of(explicit, marginal=False)["w"] is Kind.DETERMINISTIC


@pytest.mark.parametrize(
    ("case", "site", "kind"),
    [
        ("effect of a cell", "e", Kind.LOCAL),
        ("l of another law", "l", Kind.LOCAL),
        ("site of a PyroModule", "loc", Kind.LOCAL),
        ("enumerated", "c", Kind.ENUMERATED),
        ("infinitely many values", "lineages", Kind.DISCRETE),
        ("of every cell and gene, called w", "w", Kind.PER_GENE),
        ("global", "tau", Kind.GLOBAL),
        ("global in a plate", "m", Kind.GLOBAL),
        ("not enumerated", "coin", Kind.DISCRETE),
        ("factor", "push", Kind.FACTOR),
        ("second observation", "protein", Kind.OBSERVED),
        ("point mass", "point", Kind.POINT),
        ("subsampled plate", "some", Kind.SUBSAMPLED),
        ("subsampled plate", "picked", Kind.DETERMINISTIC),
    ],
)
def test_a_site_is_of_a_kind_by_how_it_is_sampled_not_by_its_name(case, site, kind):
    assert kinds_of(KINDS[case][0]())[site] is kind


def test_two_sites_of_one_name_are_refused():
    with pytest.raises(ModelError, match="two sites called 'l'"):
        KINDS["l twice"][0]().discovered()


@pytest.mark.parametrize("case", sorted(set(KINDS) - {"in the explicit program", "subsampled plate"}))
def test_every_program_can_be_listed(case):
    build, site = KINDS[case]
    assert any(re.fullmatch(site, one.name) for one in build().sites(marginal=True))


def test_a_model_that_was_moved_is_looked_at_where_it_is():
    model = made(prior=lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1)).double()
    assert {site.value.dtype for site in model.discovered()} == {torch.float64}


def test_a_look_at_a_program_is_the_same_every_time():
    model = ps.SCVI(GENES)
    first, second = model.discovered(), model.discovered()
    assert all(torch.equal(a.value, b.value) for a, b in zip(first, second, strict=True))
    other = model.discovered(seed=1)
    assert not torch.equal(first[0].value, other[0].value)


def test_a_program_of_no_model_can_be_looked_at():
    class Small(torch.nn.Module):
        def forward(self):
            with pyro.plate("cells", 3, dim=-2):
                return pyro.sample("e", dist.Normal(0.0, 1.0))

    (site,) = discovered(Small())
    assert (site.name, site.kind, tuple(site.batch_shape)) == ("e", Kind.LOCAL, (3, 1))


def test_a_weight_prior_that_samples_nothing_is_refused():
    with pytest.raises(ModelError, match=r"prior of 'decoder\.heads\.log_mean\.bias' samples nothing"):
        ps.SCVI(GENES, 2, weight_priors={"decoder.heads.log_mean.bias": lambda name, like: torch.zeros_like(like)})


@pytest.mark.parametrize("name", ["weights", "prior", "observe", "sites", "trained", "trained_on", "n_latent", "takes"])
@pytest.mark.parametrize("value", ["2020", torch.nn.Parameter(torch.ones(3))], ids=["text", "parameter"])
def test_a_program_that_gives_a_name_of_the_model_another_meaning_is_refused(name, value):
    class Own(ps.SCVI):
        def __init__(self):
            super().__init__(GENES, 2)
            setattr(self, name, value)

    with pytest.raises(ModelError, match=f"Own gives '{name}' another meaning.*self.own_{name}"):
        Own()


def test_a_program_may_exchange_parts_and_have_names_of_its_own():
    class Own(ps.SCVI):
        def __init__(self):
            super().__init__(GENES, 2)
            self.prior = ps.priors.StudentT(2)
            self.own_weights = torch.nn.Parameter(torch.ones(3))

    assert Own().prior_of(torch.zeros(2, 0)).event_shape == (2,)
