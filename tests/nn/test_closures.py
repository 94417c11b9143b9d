"""Trainable things that only the code of a part reaches are refused when the model is made; what is owned passes."""

import functools
import types

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_scvi as ps
from pyro_scvi.errors import ModelError

ONE = torch.ones(1)
NETWORK, PARAMETER, FROZEN = nn.Linear(1, 2), nn.Parameter(torch.zeros(2)), nn.Linear(1, 2).requires_grad_(False)
LEAF, CONSTANT = torch.zeros(2, requires_grad=True), torch.zeros(2)
PLACE, HELD = types.SimpleNamespace(network=nn.Linear(1, 2)), {"networks": [nn.Linear(1, 2)]}


def law(loc):
    return dist.Normal(loc, 1.0).to_event(1)


def helper():
    return law(NETWORK(ONE))


def by_default(network=NETWORK):
    return law(network(ONE))


def by_keyword(*, network=NETWORK):
    return law(network(ONE))


def closure():
    network = nn.Linear(1, 2)
    return lambda: law(network(ONE))


def twice():
    inner = closure()
    return lambda: inner()


class Holder:
    def __init__(self):
        self.network = nn.Linear(1, 2)

    def prior(self):
        return law(self.network(ONE))

    def through(self):
        return self.prior()

    def constant(self):
        return law(CONSTANT)


class Called:
    def __init__(self):
        self.loc = nn.Parameter(torch.zeros(2))

    def __call__(self):
        return self.law()

    def law(self):
        return law(self.loc)


class Slotted:
    __slots__ = ("__hidden", "loc")

    def __init__(self):
        self.loc, self.__hidden = nn.Parameter(torch.zeros(2)), [nn.Linear(1, 2)]

    def __call__(self):
        return law(self.loc)

    def hidden(self):
        return law(self.__hidden[0](ONE))


class Config:
    network = nn.Linear(1, 2)


class Owned(nn.Module):
    def __init__(self):
        super().__init__()
        self.network, self.networks = nn.Linear(1, 2), nn.ModuleList([nn.Linear(1, 2)])

    def forward(self):
        return law(self.network(ONE) + self.networks[0](ONE))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.networks = [nn.Linear(1, 2)]

    def forward(self):
        return law(self.networks[0](ONE))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Listed()

    def forward(self):
        return self.inner()


HOLDER, OWNED, SLOTTED = Holder(), Owned(), Slotted()
LOST = {
    "a slot": Slotted(),
    "a slot behind a closure": lambda: SLOTTED(),
    "a slot of a private name": SLOTTED.hidden,
    "a global parameter": lambda: law(PARAMETER),
    "a global tensor": lambda: law(LEAF),
    "a global network": lambda: law(NETWORK(ONE)),
    "inside a comprehension": lambda: max([law(PARAMETER) for _ in range(1)], key=id),
    "another function of the file": lambda: helper(),
    "a closure": closure(),
    "a closure of a closure": twice(),
    "a default": by_default,
    "a default by keyword": by_keyword,
    "a partial": functools.partial(by_default, NETWORK),
    "a partial of a module": functools.partial(Owned()),
    "a method": HOLDER.prior,
    "a method by a method": HOLDER.through,
    "a method of a global object": lambda: HOLDER.prior(),
    "a method of a module": OWNED.forward,
    "a module by a function": lambda: OWNED(),
    "an object that is called": Called(),
    "an attribute of an object": lambda: law(PLACE.network(ONE)),
    "an attribute of a class": lambda: law(Config.network(ONE)),
    "a list in a dict": lambda: law(HELD["networks"][0](ONE)),
    "a module's list": Listed(),
    "a list of a module's module": Outer(),
}
OWN = {
    "constants": lambda: law(CONSTANT),
    "a frozen network": lambda: law(FROZEN(ONE)),
    "a method that uses no network": HOLDER.constant,
    "a partial of constants": functools.partial(law, CONSTANT),
    "a module": Owned(),
    "a mixture of the package": ps.priors.GaussianMixture(2),
}


@pytest.mark.parametrize("case", LOST)
def test_what_no_module_owns_is_refused(case):
    with pytest.raises(ModelError, match="only through the code of the prior"):
        ps.SCVI(20, 2, prior=LOST[case], n_hidden=8)


@pytest.mark.parametrize("case", OWN)
def test_what_a_module_owns_or_nobody_trains_passes(case):
    ps.SCVI(20, 2, prior=OWN[case], n_hidden=8)


def test_the_message_says_how_it_is_reached():
    with pytest.raises(ModelError, match="prior -> helper -> NETWORK.bias, prior -> helper -> NETWORK.weight"):
        ps.SCVI(20, 2, prior=LOST["another function of the file"])


def test_a_likelihood_is_looked_into_as_well():
    class Scaled(ps.likelihoods.NB):
        def theta(self, eta, gamma):
            return super().theta(eta, gamma) | {"log_mean": eta["log_mean"] + NETWORK(ONE).sum()}

    with pytest.raises(ModelError, match="likelihood -> NETWORK"):
        ps.SCVI(20, 2, likelihood=Scaled())


def test_a_subclass_of_the_model_is_looked_into_when_it_is_fitted(cells):
    class Shifted(ps.SCVI):
        def decode(self, z, log_library, gamma):
            return super().decode(z + NETWORK(ONE), log_library, gamma)

    with pytest.raises(ModelError, match="model -> NETWORK"):
        ps.fit(Shifted(cells.n_genes, 2, n_hidden=8), cells, epochs=1, progress=False)
