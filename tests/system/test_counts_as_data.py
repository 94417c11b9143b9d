"""A program conditions on the counts and does nothing else with them, and a cell's density is its own."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.reparam import LocScaleReparam

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from pyro_scvi.program import cells_plate, check_inputs, register
from tests.support.toys import N_GENES, Toy, cells_of, fit_of, toy


class Reading(Toy):
    """A program with places for code that reads the counts."""

    def tau(self, x):
        return pyro.sample("tau", dist.HalfNormal(torch.tensor(2.0).double()))

    def z(self, x):
        return pyro.sample("z", self.prior())

    def added(self, x, gamma):
        """What is added to the log means; x is None where counts are drawn."""
        return 0.0

    def observed(self, x, theta, **options):
        return self.observe(x, theta, **options)

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        tau = self.tau(x)
        with cells_plate(gamma, index, n_cells):
            theta = self.decode(self.z(x), self.library(x, gamma), gamma)
            e = pyro.sample("e", dist.Normal(torch.zeros(()).double(), tau))
            theta["log_mean"] = theta["log_mean"] + e + self.added(x, gamma)
            return self.observed(x, theta, marginal=marginal, mask=mask)


def adding(name, added):
    """A program that adds this to the log means, where there are counts."""
    more = {"added": lambda self, x, gamma: 0.0 if x is None else added(x, gamma)}
    return type(name, (Reading,), more)


class ReadingPrior(Reading):
    def z(self, x):
        loc = 0.0 if x is None else 0.1 * x.mean(-1, keepdim=True)[..., None]
        return pyro.sample("z", dist.Normal(torch.zeros(1).double() + loc, 1.0).to_event(1))


class Empirical(Reading):
    def tau(self, x):
        scale = torch.ones(()).double() if x is None else 1 + x.mean()
        return pyro.sample("tau", dist.HalfNormal(scale))


class WithoutZeros(Reading):
    def observed(self, x, theta, *, marginal, mask):
        return self.observe(x, theta, marginal=marginal, mask=mask if x is None else x > 0)


class Chosen(Reading):
    """The law of a discrete latent reads the counts."""

    def added(self, x, gamma):
        p = torch.full((len(gamma), 1), 0.3).double() if x is None else (x[..., :1] > 5) * 0.5 + 0.2
        return pyro.sample("on", dist.Bernoulli(p), infer={"enumerate": "parallel"})


READING = {
    "x": [
        adding("Total", lambda x, gamma: (x.sum(-1, keepdim=True) / 8).clamp(min=0.1).log()),
        adding("OneGene", lambda x, gamma: 0.1 * x[..., :1]),
        adding("Large", lambda x, gamma: 1.0 * (x > 50).any(-1, keepdim=True)),
        adding("Deep", lambda x, gamma: 1.0 * (x.sum(-1, keepdim=True) > 2000)),
        adding("LargeInBatch", lambda x, gamma: 1.0 * (x.max() > 8)),
        adding("OfTwoGenes", lambda x, gamma: x[..., :1].log1p() - x[..., 2:3].log1p()),
        adding("MarkerGate", lambda x, gamma: 1.0 * ((x[..., :1] > 0) & (x[..., 2:3] == 0))),
        adding("Sorted", lambda x, gamma: 0.1 * x.sort(0).values),
        WithoutZeros,
    ],
    "z": [ReadingPrior],
    "tau": [Empirical],
    "on": [Chosen],
}


@pytest.mark.parametrize(("kind", "site"), [(kind, site) for site, kinds in READING.items() for kind in kinds])
def test_counts_that_are_read_are_refused_by_the_site_that_they_change(kind, site):
    with pytest.raises(ModelError, match=f"density of the site '{site}' depends on the counts"):
        ps.guides.DiagonalNormal(toy(kind))


HONEST = [
    Reading,
    adding("OfTheirShape", lambda x, gamma: x.new_zeros(len(x), 1)),
    adding("Nothing", lambda x, gamma: 0 * x.sum(-1, keepdim=True)),
]
LIBRARIES = [
    ps.libraries.NoLibrary,
    ps.libraries.LatentLibrary,
    ps.libraries.ObservedLibrary,
]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", HONEST)
def test_programs_that_condition_alone_are_not(kind, library):
    ps.guides.DiagonalNormal(toy(kind, library=library()))


class UpTo(Reading):
    """Counts of 0 to 5, whose probabilities are a table."""

    def observed(self, x, theta, *, marginal, mask):
        table = dist.Categorical(logits=theta["log_mean"][..., None] * torch.arange(6.0).double())
        with pyro.plate("genes", self.n_genes, dim=-1), pyro.poutine.mask(mask=mask):
            return pyro.sample("x", table, obs=x)


def test_programs_that_take_small_counts_only_are_looked_at_with_these():
    ps.guides.DiagonalNormal(toy(UpTo))
    with pytest.raises(ModelError, match="'x' depends on the counts"):
        ps.guides.DiagonalNormal(toy(type("Both", (UpTo, READING["x"][1]), {})))


def test_a_library_that_reads_counts_and_has_no_distribution_of_them_is_refused():
    class Mean(ps.libraries.NoLibrary):
        def forward(self, x, gamma):
            return None if x is None else x.mean(-1, keepdim=True)

        def log_mean(self, eta, log_library):
            return eta if log_library is None else eta + log_library

    with pytest.raises(ModelError, match="'x' depends on the counts"):
        ps.guides.DiagonalNormal(toy(Reading, library=Mean()))


class Logarithms(Reading):
    def observed(self, x, theta, *, marginal, mask):
        with pyro.plate("genes", self.n_genes, dim=-1), pyro.poutine.mask(mask=mask):
            return pyro.sample("x", dist.Normal(theta["log_mean"], 1.0), obs=None if x is None else x.log1p())


def test_something_else_than_the_counts_is_not_observed():
    with pytest.raises(ModelError, match="observes a function of the counts as 'x'"):
        ps.guides.DiagonalNormal(toy(Logarithms))


# --- the cells beside a cell ---


@pytest.mark.parametrize(
    "kind",
    [
        adding("MoreThanThree", lambda x, gamma: 1.0 * (len(x) > 3)),
        adding("MoreThanAHundred", lambda x, gamma: 1.0 * (len(x) > 100)),
        adding("Alone", lambda x, gamma: 1.0 * (len(x) == 1)),
        adding("MeanOfGenes", lambda x, gamma: 0.1 * x.mean(0)),
        adding("First", lambda x, gamma: 0.1 * x[:1]),
        adding("Last", lambda x, gamma: torch.arange(len(x) - 1, -1, -1).double()[:, None]),
    ],
    ids=lambda kind: kind.__name__,
)
def test_a_density_that_depends_on_the_cells_beside_one_is_refused(kind):
    with pytest.raises(ModelError, match="depends on the cells that come with it"):
        ps.guides.DiagonalNormal(toy(kind))


# --- values that change in place ---


class InPlace(Reading):
    """The program changes what it was given."""

    changed = "z"

    def tau(self, x):
        tau = super().tau(x)
        return tau.mul_(2.0) if self.changed == "tau" else tau

    def z(self, x):
        z = super().z(x)
        return z.add_(1.0) if self.changed == "z" else z

    def added(self, x, gamma):
        if x is not None and self.changed == "x":
            x.clamp_(min=2)
        if self.changed == "gamma":
            gamma.sub_(0.5)
        return 0.0


@pytest.mark.parametrize("changed", ["z", "tau", "x", "gamma"])
def test_changes_in_place_are_refused_by_what_they_change(changed):
    kind = type("Changing", (InPlace,), {"changed": changed})
    with pytest.raises(ModelError, match=f"changes the value of '{changed}' in place"):
        ps.guides.DiagonalNormal(kind(N_GENES, 1, 1, n_hidden=4, n_layers=1, norm=None).double())


# --- reasons ---


class Reparametrised(Reading):
    def added(self, x, gamma):
        with pyro.poutine.reparam(config={"a": LocScaleReparam(0.0)}):
            return pyro.sample("a", dist.Normal(torch.tensor(0.3).double(), 0.8))


class OfWholeCells(Reading):
    def observed(self, x, theta, *, marginal, mask):
        counts = dist.Multinomial(10, logits=theta["log_mean"][..., None, :])
        return pyro.sample("x", counts, obs=None if x is None else x[..., None, :])


class AsEvents(Reading):
    def observed(self, x, theta, *, marginal, mask):
        counts = dist.Poisson(theta["log_mean"].exp()[..., None, :]).to_event(1)
        return pyro.sample("x", counts, obs=None if x is None else x[..., None, :])


class WithoutMarginal(Reading):
    def forward(self, x, gamma=None):
        return super().forward(x, gamma)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Reparametrised, "'a' is a value that is computed from other sites"),
        (OfWholeCells, r"'x' \(Multinomial\) is of events .*ObservedLibrary"),
        (AsEvents, r"'x' \(Poisson\) is of events .* leave to_event out"),
        (WithoutMarginal, r"WithoutMarginal.forward does not take marginal=: begin it with def forward\(self, x, "),
    ],
)
def test_the_reason_is_that_of_the_program(kind, message):
    with pytest.raises(ModelError, match=message):
        ps.guides.DiagonalNormal(toy(kind))


def test_a_program_that_takes_no_minibatch_is_told_so_by_fit():
    class WithoutIndex(Reading):
        def forward(self, x, gamma=None, *, marginal=True, mask=True):
            return super().forward(x, gamma, marginal=marginal, mask=mask)

    with pytest.raises(ModelError, match="does not take index="):
        ps.fit(toy(WithoutIndex), cells_of(), epochs=1, dtype=torch.float64, progress=False)
    with pytest.raises(ModelError, match="does not take marginal="):
        toy(WithoutMarginal).sites()


@pytest.mark.parametrize("value", [2.0, np.array(2.0), torch.tensor(2.0)])
def test_one_number_is_no_array_of_draws(value):
    with pytest.raises(ModelError, match=r"draws of 'tau' must be an array .* write \[2.0\]"):
        fit_of(toy(Reading)).with_globals({"tau": value})
    with pytest.raises(ModelError, match="draws of 'z' must be an array"):
        ps.Given({"z": value})
