"""The bound that training ascends against Pyro's own, and the shortcuts of a step against the long way."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from pyro_scvi.inference.elbo import MeanFieldELBO
from pyro_scvi.training.checks import TemperedLatents
from pyro_scvi.utils.execution import executing
from tests.support.toys import Toy, cells_of, fit_of, toy

GUIDES = [ps.guides.DiagonalNormal, ps.guides.FullRankNormal, ps.guides.InverseAutoregressiveFlow, ps.guides.Point]
PRIORS = {
    "normal": lambda n: None,
    "mixture": lambda n: ps.priors.GaussianMixture(n, 4),
    "laplace": lambda n: ps.priors.Laplace(n),
    "dirichlet": lambda n: ps.priors.Dirichlet(n),
}
WEIGHTS = {
    "none": {},
    "normal": {"decoder.heads.log_mean.weight": ps.weights.NormalWeights()},
    "horseshoe": {"decoder.heads.log_mean.weight": ps.weights.HorseshoeWeights()},
}


def model_and_guide(cells, prior="normal", guide=ps.guides.DiagonalNormal, weights="none"):
    model = ps.SCVI(cells.n_genes, 3, prior=PRIORS[prior](3), weight_priors=WEIGHTS[weights], n_hidden=8)
    return model.double(), guide(model, n_hidden=8).double()


def loss_and_gradients(elbo, model, guide, cells, *, seed=1, **options):
    x, gamma = cells[np.arange(30)]
    rows = torch.arange(30)
    torch.manual_seed(seed)
    parts = torch.nn.ModuleList([model, guide])
    parts.zero_grad()
    with pyro.get_param_store().scope():
        loss = elbo.loss_and_grads(model, guide, x.double(), gamma.double(), index=rows, n_cells=60, **options)
    return loss, {name: p.grad.clone() for name, p in parts.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-9, msg=name)


# A learned prior is refused beside points, onto which it would collapse.
PAIRS = [(prior, guide) for prior in PRIORS for guide in GUIDES if (prior, guide) != ("mixture", ps.guides.Point)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_value_and_gradients_are_those_of_pyro(cells, prior, guide, weights):
    parts = model_and_guide(cells, prior, guide, weights)
    expected = loss_and_gradients(TraceMeanField_ELBO(), *parts, cells)
    with executing(check_programs=False):
        assert_same(loss_and_gradients(MeanFieldELBO(), *parts, cells), expected)


@pytest.mark.parametrize("options", [{"mask": torch.arange(20) % 3 > 0}, {"mask": False}])
def test_masks_are_those_of_pyro(cells, options):
    parts = model_and_guide(cells)
    expected = loss_and_gradients(TraceMeanField_ELBO(), *parts, cells, **options)
    with executing(check_programs=False):
        found = loss_and_gradients(MeanFieldELBO(), *parts, cells, **options)
    for name, gradient in expected[1].items():  # of parameters that a mask leaves without effect
        found[1].setdefault(name, torch.zeros_like(gradient))
    assert_same(found, expected)


def test_a_tempered_divergence_is_that_of_pyro(cells):
    parts = model_and_guide(cells)
    with TemperedLatents(0.3, {"z"}), executing(check_programs=False):
        expected = loss_and_gradients(TraceMeanField_ELBO(), *parts, cells)
        assert_same(loss_and_gradients(MeanFieldELBO(), *parts, cells), expected)


def test_pyro_checks_programs_unless_told_otherwise(cells):
    """A site of the guide that the model lacks passes in silence without Pyro's own estimator."""
    model, guide = model_and_guide(cells)

    def more(*args, **kwargs):
        pyro.sample("other", pyro.distributions.Normal(0.0, 1.0))
        return guide(*args, **kwargs)

    with pytest.warns(UserWarning, match="other"), pytest.raises(ModelError, match="'other'"):
        MeanFieldELBO().loss_and_grads(model, more, *(t.double() for t in cells[:]))


def test_registration_may_be_left_out(cells):
    model, guide = model_and_guide(cells)
    x, gamma = (t.double() for t in cells[:])
    with pyro.get_param_store().scope():
        assert len(list(pyro.poutine.trace(model).get_trace(x, gamma).param_nodes))
        with executing(register_parameters=False):
            trace = pyro.poutine.trace(model).get_trace(x, gamma)
            assert not list(trace.param_nodes)
        assert len(list(pyro.poutine.trace(guide).get_trace(x, gamma).param_nodes))
    assert {"z", "l", "x"} <= set(trace.nodes)


def test_a_fit_is_that_of_pyros_estimator(cells):
    """Epoch by epoch, with all shortcuts of a step against none: rows without registration and unused densities."""
    histories = []
    for elbo in (None, TraceMeanField_ELBO()):
        model, guide = model_and_guide(cells)
        fit = ps.fit(model, cells, guide, epochs=4, batch_size=16, dtype=torch.float64, elbo=elbo, progress=False)
        histories.append(fit.history[["train_loss", "held_out_loss", "kl"]].to_numpy())
    np.testing.assert_allclose(*histories, rtol=1e-9)


def test_matrix_products_in_bfloat16_train_nearly_the_same(cells):
    losses, guides = [], []
    for autocast in (None, torch.bfloat16):
        model = ps.SCVI(cells.n_genes, 3, n_hidden=16)
        guides.append(ps.guides.DiagonalNormal(model, n_hidden=16))
        fit = ps.fit(model, cells, guides[-1], epochs=3, autocast=autocast, validation=0, progress=False)
        losses.append(fit.history.train_loss.to_numpy())
    assert not np.array_equal(*losses)
    np.testing.assert_allclose(*losses, rtol=2e-3)
    assert {p.dtype for guide in guides for p in guide.parameters()} == {torch.float32}


def test_other_types_for_matrix_products_are_refused(cells):
    with pytest.raises(ps.errors.ModelError, match="bfloat16, got torch.float16"):
        ps.fit(ps.SCVI(cells.n_genes), cells, autocast=torch.float16)


def test_more_draws_than_one_are_refused():
    with pytest.raises(TypeError, match="num_particles"):
        MeanFieldELBO(num_particles=8)


class Donors(Toy):
    """What three donors add, and a cluster that is summed out."""

    dim = -1

    def forward(self, *args, **options):
        with pyro.plate("donors", 3, dim=self.dim):
            self.added = pyro.sample("m", dist.Normal(torch.zeros(()).double(), 1.0)).sum()
        return super().forward(*args, **options)

    def more(self):
        half = torch.full((), 0.5).double()
        return self.added + 2 * pyro.sample("c", dist.Bernoulli(half), infer={"enumerate": "parallel"})


class DonorsLeftOfCells(Donors):
    dim = -3


def test_plates_left_of_the_cells_change_no_bound():
    losses = []
    for kind in (Donors, DonorsLeftOfCells):
        fit = fit_of(toy(kind))
        x, gamma = (tensor.double() for tensor in cells_of()[:])
        torch.manual_seed(1)
        with pyro.get_param_store().scope():
            losses.append(MeanFieldELBO().loss(fit.model, fit.guide, x, gamma))
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def test_a_site_that_only_the_guide_needs_is_counted_as_pyro_counts_it(cells):
    model, guide = model_and_guide(cells)
    x, gamma = (tensor.double() for tensor in cells[:])

    def more(*args, **kwargs):
        normal = pyro.distributions.Normal(torch.zeros(()).double(), 0.1)
        pyro.sample("noise", normal, infer={"is_auxiliary": True})
        return guide(*args, **kwargs)

    losses = []
    for elbo in (TraceMeanField_ELBO(), MeanFieldELBO()):
        torch.manual_seed(1)
        with pyro.get_param_store().scope(), executing(check_programs=False):
            losses.append(elbo.differentiable_loss(model, more, x, gamma).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
