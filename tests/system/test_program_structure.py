"""Programs whose sites, values or randomness differ from one run to the next are refused by name, in every verb."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions.transforms import AbsTransform

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from pyro_scvi.program import cells_plate, check_inputs, register
from tests.support.toys import N_GENES, Toy, fit_of, toy

pytestmark = pytest.mark.filterwarnings("ignore:k-hat is above", "ignore:sampler_khat is above")

SUMMED_OUT = {"enumerate": "parallel"}
LABELS = ["a", "b", "a", "b"]
QUICK = ps.Importance(steps=3, rounds=1, proposals=40)
HALF = torch.tensor(0.5).double()


def cells():
    """Two cells with large counts among others."""
    return ps.Cells.from_counts(np.array([[9, 7, 11, 8], [60, 70, 55, 80], [1, 2, 0, 3], [90, 2, 0, 3]]))


class Depending(Toy):
    """What is added to the log means may depend on the counts."""

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        # Between 50 and 100 there are no counts of a look, which would refuse the program when its guide is made.
        self.large, self.drawing = x is not None and bool(((x > 50) & (x < 100)).any()), x is None
        before = self.before()
        with cells_plate(gamma, index, n_cells):
            z = pyro.sample("z", self.prior())
            theta = self.decode(z, self.library(x, gamma), gamma)
            theta["log_mean"] = theta["log_mean"] + self.more() + before
            return self.observe(x, theta, marginal=marginal, mask=mask)

    def before(self):
        return 0.0

    def more(self):
        return 0.0


class LosesEnumerated(Depending):
    def more(self):
        return 0.0 if self.large else 3 * pyro.sample("on", dist.Bernoulli(HALF), infer=SUMMED_OUT)


class GainsEnumerated(Depending):
    def more(self):
        return pyro.sample("on", dist.Bernoulli(HALF), infer=SUMMED_OUT) if self.large else 0.0


class LosesLatent(Depending):
    def more(self):
        return 0.0 if self.large else pyro.sample("on", dist.Normal(0.0, 1.0))


class GainsLatent(Depending):
    def more(self):
        return pyro.sample("on", dist.Normal(0.0, 1.0)) if self.large else 0.0


class LosesGlobal(Depending):
    def before(self):
        return 0.0 if self.large else pyro.sample("on", dist.Normal(HALF, 1.0))


class NotSummed(Depending):
    def more(self):
        return pyro.sample("on", dist.Bernoulli(HALF), infer={} if self.large else SUMMED_OUT)


class Wider(Depending):
    def more(self):
        return pyro.sample("on", dist.Uniform(0.0, 2.0 if self.large else 1.0))


class Negative(Depending):
    def more(self):
        return pyro.sample("on", dist.Normal(0.0, 1.0) if self.large else dist.LogNormal(0.0, 1.0))


class Longer(Depending):
    def more(self):
        c = pyro.sample("on", dist.Categorical(torch.ones(3 if self.large else 2).double()), infer=SUMMED_OUT)
        return c.double()


OTHER_SITES = [LosesEnumerated, GainsEnumerated, LosesLatent, GainsLatent, LosesGlobal, NotSummed]
OTHER_VALUES = [Wider, Negative, Longer]
EFFORT = {"samples": 8, "steps": 2, "rounds": 0}
VERBS = {
    "evidence": lambda fit: ps.evidence(fit, cells(), **EFFORT),
    "compare": lambda fit: ps.compare({"a": fit, "b": fit}, cells(), samples=8),
    "annealed_evidence": lambda fit: ps.annealed_evidence(fit, cells(), chains=4, temperatures=3),
    "importance": lambda fit: ps.sample_posterior(fit, cells(), samples=4, sampler=QUICK),
    "w": lambda fit: ps.sample_posterior(fit, cells(), samples=4, sites=("w",)),
    "impute": lambda fit: ps.impute(fit, cells(), samples=2),
    "leave_one_out": lambda fit: ps.leave_one_out(fit, cells(), samples=8, sampler=QUICK),
    "posterior_predictive": lambda fit: ps.posterior_predictive(fit, cells(), samples=2),
    "check_predictions": lambda fit: ps.check_predictions(fit, cells(), samples=4),
    "to_datatree": lambda fit: ps.to_datatree(fit, cells(), samples=4),
    "log_density": lambda fit: ps.log_density(fit, cells())(torch.zeros(1, 4, fit.guide.coordinates.size)),
    "differential_expression": lambda fit: ps.differential_expression(
        fit, cells(), groupby=LABELS, group_a="a", group_b="b", estimand=ps.differential.RandomPairs(most_pairs=4)
    ),
    "fit": lambda fit: ps.fit(fit.model, cells(), epochs=1, validation=0, dtype=torch.float64, progress=False),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", [LosesEnumerated, GainsLatent])
def test_every_verb_refuses_cells_for_which_the_program_has_other_sites(kind, verb):
    with pytest.raises(ModelError, match="'on' under a condition"):
        VERBS[verb](fit_of(toy(kind)))


@pytest.mark.parametrize("verb", ["evidence", "impute", "posterior_predictive", "fit"])
@pytest.mark.parametrize("kind", OTHER_SITES)
def test_sites_may_neither_come_nor_go(kind, verb):
    with pytest.raises(ModelError, match="'on' under a condition"):
        VERBS[verb](fit_of(toy(kind)))


@pytest.mark.parametrize("kind", OTHER_VALUES)
def test_values_may_not_be_others_either(kind):
    with pytest.raises(ModelError, match="'on' has other values"):
        VERBS["evidence"](fit_of(toy(kind)))


def test_cells_that_the_guide_knows_are_scored_as_ever():
    fit = fit_of(toy(LosesEnumerated))
    assert np.isfinite(ps.evidence(fit, cells().take([0, 2]), **EFFORT).log_evidence).all()


class LosesInTraining(Depending):
    def more(self):
        return 0.0 if self.large and self.training else pyro.sample("on", dist.Normal(0.0, 1.0))


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
@pytest.mark.parametrize("elbo", [None, pyro.infer.Trace_ELBO()])
@pytest.mark.parametrize("kind", [LosesLatent, GainsLatent, LosesInTraining])
def test_a_minibatch_with_other_sites_ends_training(kind, elbo):
    counts = np.random.default_rng(0).poisson(2.0, (40, N_GENES))
    counts[25] = 60
    options = {"epochs": 2, "batch_size": 8, "validation": 0, "dtype": torch.float64, "progress": False}
    with pytest.raises(ModelError, match="'on' under a condition") as raised:
        ps.fit(toy(kind), ps.Cells.from_counts(counts), elbo=elbo, **options)
    assert "Trace Shapes" not in str(raised.value)


class GainsInDraws(Depending):
    def more(self):
        return pyro.sample("on", dist.Normal(0.0, 1.0)) if self.drawing else 0.0


class LosesInDraws(Depending):
    def more(self):
        return 0.0 if self.drawing else pyro.sample("on", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("kind", [GainsInDraws, LosesInDraws])
def test_so_are_programs_that_draw_otherwise_than_they_score(kind):
    with pytest.raises(ModelError, match="'on' under a condition"):
        ps.prior_predictive(toy(kind), 3)


def test_draws_of_latents_that_draws_lack_are_none():
    with pytest.raises(ModelError, match="'on' under a condition"):
        ps.evidence(fit_of(toy(LosesInDraws)), cells(), **EFFORT)


# --- what is random must be a site ---


class Noisy(Depending):
    def more(self):
        return pyro.sample("e", dist.Normal(0.0, 1.0)) + 0.5 * torch.randn(())


class OfNumPy(Depending):
    def more(self):
        return float(np.random.random())  # noqa: NPY002


class Dropping(Depending):
    def more(self):
        e = pyro.sample("e", dist.Normal(1.0, 1.0))
        return torch.nn.functional.dropout(e.expand(*e.shape[:-1], N_GENES))


class NoisyGlobal(Depending):
    def before(self):
        return pyro.sample("tau", dist.Normal(torch.rand(()).double(), 1.0))


class Counting(Depending):
    times = 0

    def more(self):
        self.times += 1
        return 0.1 * self.times


class NoisyPrior(torch.nn.Module):
    def forward(self):
        return dist.Normal(torch.rand(1).double(), 1.0).to_event(1)


@pytest.mark.parametrize(
    ("model", "site"),
    [
        (lambda: toy(Noisy), "x"),
        (lambda: toy(OfNumPy), "x"),
        (lambda: toy(Dropping), "x"),
        (lambda: toy(NoisyGlobal), "tau"),
        (lambda: toy(Counting), "x"),
        (lambda: toy(prior=NoisyPrior()), "z"),
    ],
)
def test_random_numbers_of_no_site_are_refused(model, site):
    with pytest.raises(ModelError, match=f"the density of the site '{site}' differs between two runs"):
        fit_of(model())


# --- laws and places that cannot be ---


class Several(Depending):
    def more(self):
        return pyro.sample("on", dist.Bernoulli(torch.tensor([0.3, 0.6]).double()).to_event(1), infer=SUMMED_OUT).sum(
            -1
        )


class OfDrawnSize(Depending):
    def more(self):
        n = pyro.sample("n", dist.Categorical(torch.ones(3).double()), infer=SUMMED_OUT)
        return pyro.sample("on", dist.Binomial(n.double(), HALF), infer=SUMMED_OUT)


class Absolute(Depending):
    def more(self):
        return pyro.sample("on", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [AbsTransform()]))


class Nameless(Depending):
    def more(self):
        return pyro.sample("", dist.Normal(0.0, 1.0))


class Late(Depending):
    def observe(self, x, theta, **options):
        drawn = super().observe(x, theta, **options)
        pyro.sample("on", dist.Normal(0.0, 1.0))
        return drawn


class OfGenes(Depending):
    plate = "genes"

    def before(self):
        with pyro.plate(self.plate, N_GENES, dim=-1):
            return pyro.sample("effect", dist.Normal(torch.zeros(()).double(), 1.0))


class OwnPlate(OfGenes):
    plate = "genes of effect"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Several, "'on' cannot be summed out, because its distribution does not list its values"),
        (OfDrawnSize, "'on' cannot be summed out, because its distribution does not list its values"),
        (Absolute, "'on' .TransformedDistribution. has no density"),
        (Nameless, "empty name"),
        (Late, "samples 'on' after x"),
        (OfGenes, "observe makes the plate 'genes', so that one of your own needs another name"),
    ],
)
def test_the_reason_and_the_remedy_are_said(kind, message):
    with pytest.raises(ModelError, match=message):
        fit_of(toy(kind))


def test_a_plate_of_another_name_does():
    fit = fit_of(toy(OwnPlate))
    draws = ps.sample_posterior(fit, cells(), samples=3, sites=("effect", "z"), progress=False)
    assert draws.effect.shape == (3, N_GENES)
    assert np.isfinite(ps.evidence(fit, cells(), **EFFORT).log_evidence).all()


def test_a_function_as_a_guide_is_told_what_to_write():
    with pytest.raises(ModelError, match="subclass with encode, law and start"):
        ps.fit(toy(), cells(), guide=lambda x, gamma=None: None)


def test_parts_in_other_precisions_are_refused():
    model = toy(prior=ps.priors.GaussianMixture(1, 2))
    model.prior.float()
    with pytest.raises(ModelError, match=r"different precisions \(.*is float32, .*is float64\)"):
        ps.guides.DiagonalNormal(model)


def test_constants_in_double_precision_end_no_verb():
    class Doubled(Depending):
        def more(self):
            return torch.zeros(N_GENES, dtype=torch.float64)

    fit = fit_of(toy(Doubled))
    fit.model.float(), fit.guide.float()
    few = cells().take([0, 2])
    assert np.isfinite(ps.check_predictions(fit, few, samples=4).cells).all(axis=None)
    ps.calibrate(fit, 4, sampler=QUICK, draws=19, thin=1, progress=False)
    doubled_prior = toy(prior=lambda: dist.Normal(torch.zeros(1).double(), 1.0).to_event(1)).float()
    assert ps.prior_predictive(doubled_prior, 3).shape == (3, N_GENES)
