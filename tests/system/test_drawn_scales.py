"""Latents whose scale is drawn for each cell: told, and right in the form that the warning advises."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

import pyro_scvi as ps
from tests.support.toys import N_GENES, Toy

ONE = torch.ones(()).double()
BIAS = np.array([0.7, 0.5, 1.0, 0.2])


class Flat(Toy):
    """Log means that are one latent e and a level of each gene; z changes nothing."""

    def more(self):
        return self.e()


class Horseshoe(Flat):
    def e(self):
        return pyro.sample("e", dist.Normal(0 * ONE, pyro.sample("s", dist.HalfCauchy(ONE))))


class Advised(Flat):
    def e(self):
        return pyro.sample("s", dist.HalfCauchy(ONE)) * pyro.sample("e", dist.Normal(0 * ONE, ONE))


class OneScale(Flat):
    def e(self):
        return pyro.sample("e", dist.Normal(0 * ONE, pyro.sample("s", dist.LogNormal(0 * ONE, 0.5 * ONE))))


class SpikeAndSlab(Flat):
    def e(self):
        slab = pyro.sample("c", dist.Bernoulli(0.4 * ONE), infer={"enumerate": "parallel"})
        return pyro.sample("e", dist.Normal(0 * ONE, 0.02 + 2 * slab))


def cells():
    return ps.Cells.from_counts(np.array([[0, 0, 1, 0], [2, 1, 3, 1], [0, 0, 0, 1], [9, 7, 12, 6]]))


def fit_of(kind):
    parts = {"likelihood": ps.likelihoods.Poisson(), "library": ps.libraries.NoLibrary()}
    model = kind(N_GENES, 1, decoder=ps.networks.LinearDecoder(), **parts).double()
    with torch.no_grad():
        model.decoder.heads["log_mean"].weight.zero_()
        model.decoder.heads["log_mean"].bias.copy_(torch.as_tensor(BIAS))
    guide = ps.guides.DiagonalNormal(model).double()
    import pandas as pd

    return ps.Fit(model.eval(), guide.eval(), pd.DataFrame(), cells().schema)


def truth(scales, masses):
    """Log p(x) where e is a mixture of normals of these scales, by sums over steps of e that grow with its distance."""
    ends = np.exp(np.linspace(-9, 20, 3000))
    edges = np.concatenate([-ends[::-1], [0], ends])
    middle = (edges[1:] + edges[:-1]) / 2
    mass = sum(m * np.diff(stats.norm.cdf(edges / s)) for s, m in zip(scales, masses, strict=True))
    kept = (middle < 12) & (mass > 0)
    eta = BIAS + middle[kept, None].clip(-700)
    log_p = stats.poisson.logpmf(cells().counts[:, None], np.exp(eta)).sum(-1)
    return logsumexp(log_p + np.log(mass[kept]), axis=1)


def half_cauchy():
    log_s = np.linspace(-16, 16, 1281)
    return np.exp(log_s), stats.halfcauchy.pdf(np.exp(log_s)) * np.exp(log_s) * (log_s[1] - log_s[0])


def test_a_scale_that_is_drawn_for_each_cell_is_told_by_the_latent():
    with pytest.warns(UserWarning, match=r"scale of 'e' is drawn for each cell.* e = scale \* pyro.sample\('e'"):
        ps.embed(fit_of(Horseshoe), cells())


@pytest.mark.parametrize("kind", [Advised, OneScale, SpikeAndSlab])
def test_other_scales_are_not(kind):
    ps.embed(fit_of(kind), cells())  # a warning is an error here


@pytest.mark.parametrize(
    ("kind", "law"), [(Advised, half_cauchy()), (SpikeAndSlab, ([0.02, 2.02], [0.6, 0.4]))], ids=["advised", "spike"]
)
def test_their_evidence_is_that_of_sums(kind, law):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "k-hat")
        table = ps.evidence(fit_of(kind), cells(), progress=False)
    np.testing.assert_array_less(abs(table.log_evidence - truth(*law)), 4 * table.se + 0.02)
