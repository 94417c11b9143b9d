"""Programs that Python, torch or Pyro would end with an error of their own are refused by name, in every first run."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from pyro_scvi.program import cells_plate, check_inputs, register
from tests.support.toys import N_GENES, Toy, cells_of, fit_of, toy

BIAS = {"weight_priors": {"decoder.heads.log_mean.bias": ps.weights.NormalWeights()}}


class Written(ps.SCVI):
    """Adds ``more``, from what all cells share and what each has, to the log means."""

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        shared = self.outside()
        with cells_plate(gamma, index, n_cells):
            z = pyro.sample("z", self.prior())
            more = self.more(shared)
            theta = self.decode(z, self.library(x, gamma), gamma)
            theta["log_mean"] = theta["log_mean"] + more
            return self.observe(x, theta, marginal=marginal, mask=mask)

    def outside(self):
        return 0.0

    def more(self, shared):
        return shared


class AlongCells(Written):
    size = 2  # as many as the cells of a look

    def outside(self):
        with pyro.plate("donors", self.size, dim=-2):
            return pyro.sample("m", dist.Normal(torch.zeros(()).double(), 1.0))


class AlongMoreCells(AlongCells):
    size = 6


class LawAlongCells(AlongMoreCells):
    def more(self, shared):
        return pyro.sample("e", dist.Normal(shared, 1.0))


class Summed(AlongCells):
    def more(self, shared):
        return shared.sum()


class Correlations(Written):
    def more(self, shared):
        return pyro.sample("e", dist.LKJ(2, torch.ones(()).double()))[..., 0, 1]


class OneWay(Written):
    """A flow whose inverse is not known."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.flow = dist.transforms.Planar(2)

    def more(self, shared):
        base = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
        return pyro.sample("e", dist.TransformedDistribution(base, [self.flow])).sum(-1)


class CalledCells(Written):
    name = "cells"

    def more(self, shared):
        return pyro.sample(self.name, dist.Normal(torch.zeros(()).double(), 1.0))


class CalledGenes(CalledCells):
    name = "genes"


class CalledAsPlate(AlongCells, CalledCells):
    name = "donors"


class CalledAsDimension(Written):
    def more(self, shared):
        vector = pyro.sample("m", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        return vector.sum(-1) + pyro.sample("m_dim_0", dist.Normal(torch.zeros(()).double(), 1.0))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AlongCells, {}, "its site 'm' is outside of the plate 'cells' and has 2 values along the dimension -2"),
        (AlongMoreCells, {}, "its site 'm' is outside of the plate 'cells' and has 6 values along the dimension -2"),
        (LawAlongCells, {}, "its site 'm' is outside of the plate 'cells' and has 6 values along the dimension -2"),
        (Correlations, {}, "site 'e' .LKJ. cannot be given a plate's size.*instead of dist.LKJ take dist.LKJCholesky"),
        (OneWay, {}, "site 'e' .TransformedDistribution. has a density at its own draws alone"),
        (CalledCells, {}, "site 'cells' has the name of a plate"),
        (CalledGenes, {}, "site 'genes' has the name of a plate"),
        (CalledAsPlate, {}, "site 'donors' has the name of a plate"),
        (CalledAsDimension, {}, "site 'm_dim_0' has the name that results give a dimension of 'm'"),
        (Written, BIAS, "'bias' of Linear, which weight_priors= made a latent.*'with self.weights.drawn_into"),
    ],
)
def test_the_site_and_the_remedy_are_said(kind, options, message):
    with pytest.raises(ModelError, match=message):
        fit_of(toy(kind, **options))


def test_draws_of_counts_say_it_too():
    with pytest.raises(ModelError, match=r"'with self.weights.drawn_into\(self\):'"):
        ps.prior_predictive(toy(Written, **BIAS), 3)


def test_what_broadcasts_for_any_cells_is_not_refused():
    assert ps.evidence(fit_of(toy(Summed)), cells_of(3), samples=500, progress=False).log_evidence.notna().all()


def test_errors_of_ones_own_code_stay_what_they_are():
    class Failing(Summed):
        def more(self, shared):
            raise self.error

    for error in (RuntimeError("mine"), AttributeError("mine"), NotImplementedError("mine"), ValueError("mine")):
        Failing.error = error
        with pytest.raises(type(error), match="mine"):
            fit_of(toy(Failing))


class Noted(Toy):
    def more(self):
        return pyro.deterministic("twice", 2 * pyro.sample("e", dist.Normal(torch.zeros(()).double(), 1.0)))


def test_a_function_of_latents_of_the_cells_may_be_noted():
    assert fit_of(toy(Noted)).model.sites()[2].name == "twice"


class NoReturn(Written):
    def observe(self, x, theta, **options):
        super().observe(x, theta, **options)


def test_a_forward_without_return_is_told_so_where_counts_are_drawn():
    model = toy(NoReturn)
    with pytest.raises(ModelError, match=r"end it with return self\.observe"):
        ps.prior_predictive(model, 3)
    assert ps.posterior_predictive(fit_of(model), cells_of(3), samples=2).shape == (2, 3, N_GENES)


class NoReturnOfLevel(NoReturn):
    def outside(self):
        return pyro.sample("level", dist.Normal(torch.zeros(()).double(), 1.0))


def test_so_are_data_sets_to_calibrate_by():
    fit = fit_of(toy(NoReturnOfLevel))
    with pytest.raises(ModelError, match=r"end it with return self\.observe"):
        ps.calibrate_globals(fit, cells_of(3), lambda cells: fit, 1, draws=19, progress=False)
