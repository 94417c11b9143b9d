"""Autoguides over the global latents: what they find, that they are trained and saved, and what is refused by name."""

import copy
import pickle
from functools import partial

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    init_to_sample,
)
from scipy import stats
from scipy.special import logsumexp

import pyro_scvi as ps
from pyro_scvi.errors import CheckpointError, ModelError
from pyro_scvi.inference.elbo import MeanFieldELBO
from pyro_scvi.program import cells_plate, check_inputs, register
from pyro_scvi.training.checks import TemperedLatents
from pyro_scvi.utils.execution import executing
from tests.support.programs import KNOWN, N_GENES, made
from tests.support.simulate import simulated_counts
from tests.support.toys import toy

pytestmark = pytest.mark.filterwarnings("ignore:k-hat is above")

KINDS = [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]
COUNTS = np.array([[2, 1, 3, 2]])
DONORS = KNOWN["population"][0]


class Product(ps.SCVI):
    """A rate that is the product of two numbers, of which the counts tell the product only."""

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        s = pyro.sample("s", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
        with cells_plate(gamma, index, n_cells):
            z = pyro.sample("z", self.prior())
            theta = self.decode(z, self.library(x, gamma), gamma)
            theta["log_mean"] = theta["log_mean"] * 0.0 + a + s.log()
            return self.observe(x, theta, marginal=marginal, mask=mask)


def cells():
    return ps.Cells.from_counts(simulated_counts(12, N_GENES))


def shrunk():
    """Weights whose sites' names begin with another's."""
    return made(
        weight_priors={
            "decoder.heads.log_mean.weight": ps.weights.ARDWeights(),
            "decoder.heads.gate_logits.bias": ps.weights.HierarchicalWeights(),
        }
    )


def quick(model, guide, **options):
    return ps.fit(model, cells(), guide, **{"epochs": 2, "validation": 0, "progress": False} | options)


def gap_of_bounds(model, guide, x, n):
    """Mean of n differences from Pyro's Trace_ELBO at the same draws, nats, and its standard error."""
    gaps = []
    for seed in range(n):
        losses = []
        for elbo in (MeanFieldELBO(), Trace_ELBO()):
            torch.manual_seed(seed)
            with torch.no_grad(), pyro.get_param_store().scope():
                losses.append(elbo.loss(model, guide, x))
        gaps.append(losses[0] - losses[1])
    return np.mean(gaps), np.std(gaps) / np.sqrt(n)


# --- what they find ---


def product_posterior():
    """Means, standard deviations and correlation of a and log s, on a grid."""
    a = np.linspace(-5, 5, 401)
    rate = np.exp(a[:, None] + a)
    log_p = stats.poisson.logpmf(COUNTS.sum(), COUNTS.size * rate)
    log_p = log_p + stats.norm.logpdf(a)[:, None] + stats.norm.logpdf(a)
    weights = np.exp(log_p - logsumexp(log_p))
    mean = weights.sum(1) @ a
    sd = np.sqrt(weights.sum(1) @ a**2 - mean**2)
    return mean, sd, (a @ weights @ a - mean**2) / sd**2


def product_draws(global_guide, steps):
    """Draws of a and log s after training the guide of these alone."""
    model = toy(Product).double().eval()
    guide = ps.guides.DiagonalNormal(model, n_hidden=4, n_layers=1, global_guide=global_guide).double().eval()
    x = torch.as_tensor(COUNTS).double()
    optimiser = torch.optim.Adam(guide.weights.parameters(), lr=0.2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, steps)
    torch.manual_seed(0)
    with executing(register_parameters=False, check_programs=False), pyro.validation_enabled(False):
        for _ in range(steps):
            optimiser.zero_grad()
            MeanFieldELBO().loss_and_grads(model, guide, x)
            optimiser.step()
            schedule.step()
    drawn = guide.weights.draws(500)
    return np.stack([drawn["a"].detach(), drawn["s"].detach().log()])


def test_the_posterior_of_two_correlated_globals():
    mean, sd, correlation = product_posterior()
    assert correlation < -0.85
    found = product_draws(partial(AutoMultivariateNormal, init_scale=0.5), 300)
    assert np.corrcoef(found)[0, 1] == pytest.approx(correlation, abs=0.07)
    np.testing.assert_allclose(found.std(1), sd, rtol=0.25)
    np.testing.assert_allclose(found.mean(1), mean, atol=0.5 * sd)
    apart = product_draws(None, 60)
    assert abs(np.corrcoef(apart)[0, 1]) < 0.2
    assert (apart.std(1) < 0.75 * sd).all()


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_bounds_count_the_change_of_volume(kind):
    """Of s, which is positive: its logarithm is near 3."""
    x = torch.as_tensor(COUNTS).double()
    model = toy(Product).double().eval()
    guide = ps.guides.DiagonalNormal(model, n_hidden=4, global_guide=kind)
    guide = guide.double().eval()
    with torch.no_grad():
        for name, parameter in guide.weights.named_parameters():
            if name.split(".")[1] in ("loc", "locs"):
                parameter.fill_(3.0)
    gap, se = gap_of_bounds(model, guide, x, 25)
    assert se < 0.2
    assert abs(gap) < 4 * se


def test_bounds_of_a_flow_count_the_change_of_volume():
    model = KNOWN["positive and shares"][0]().eval()
    guide = ps.guides.InverseAutoregressiveFlow(model).eval()
    x = torch.as_tensor(np.asarray(cells().counts)).float()
    gap, se = gap_of_bounds(model, guide, x, 10)
    assert se < 2
    assert abs(gap) < 4 * se


def test_a_bound_that_leaves_it_out_is_refused():
    for model, kind, options in [
        (DONORS(), ps.guides.DiagonalNormal, {"global_guide": AutoMultivariateNormal}),
        (KNOWN["positive and shares"][0](), ps.guides.InverseAutoregressiveFlow, {}),
    ]:
        with pytest.raises(ModelError, match="leaves the log Jacobian of some latents out"):
            quick(model, kind(model, **options), elbo=TraceMeanField_ELBO())


# --- start, parameters, training ---


@pytest.mark.parametrize("make", [*KINDS, partial(AutoNormal, init_scale=0.01)])
@pytest.mark.parametrize("program", [DONORS, shrunk])
def test_it_starts_where_independent_normals_do_and_leaves_no_trace(program, make):
    model = program()
    plain = ps.guides.DiagonalNormal(model).weights
    before = torch.get_rng_state()
    guide = ps.guides.DiagonalNormal(model, global_guide=make)
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(pyro.get_param_store())
    expected, found = plain.medians(), guide.weights.medians()
    assert list(found) == list(expected) == list(guide.weights.supports)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].detach())
        assert not isinstance(value, torch.nn.Parameter)
    drawn, plainly = guide.weights.draws(3), plain.draws(3)
    assert {name: value.shape for name, value in drawn.items()} == {n: v.shape for n, v in plainly.items()}
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in guide.weights.parameters())


def test_a_start_of_ones_own_is_kept():
    starts = [
        ps.guides.DiagonalNormal(DONORS(), global_guide=partial(AutoNormal, init_loc_fn=init_to_sample)),
        ps.guides.DiagonalNormal(DONORS(), global_guide=lambda program: AutoNormal(program)),
        ps.guides.DiagonalNormal(DONORS()),
    ]
    m = [guide.weights.medians()["m"].detach() for guide in starts]
    assert not torch.equal(m[0], m[2])
    torch.testing.assert_close(m[1], m[2])


@pytest.mark.parametrize("guide", ["FullRankNormal", "InverseAutoregressiveFlow", "Point", "PerCell"])
def test_every_guide_takes_one(guide):
    model = DONORS()
    arguments = [12] if guide == "PerCell" else []
    made_one = getattr(ps.guides, guide)(model, *arguments, global_guide=AutoMultivariateNormal)
    before = [parameter.detach().clone() for parameter in made_one.weights.parameters()]
    fit = quick(model, made_one)
    assert np.isfinite(fit.history.train_loss).all()
    assert all(not torch.equal(*pair) for pair in zip(before, fit.guide.weights.parameters(), strict=True))
    assert np.isfinite(ps.evidence(fit, cells().take([0]), samples=20, steps=3, progress=False).log_evidence).all()
    refined = ps.Refined(steps=2)
    assert ps.to_datatree(fit, cells().take([0, 1]), samples=4, sampler=refined)["posterior"]["m"].shape == (1, 4, 4)


def test_point_masses_are_for_the_guide_point():
    model = DONORS()
    guide = ps.guides.Point(model, global_guide=AutoDelta)
    fit = quick(model, guide)
    drawn = ps.sample_posterior(fit, cells(), samples=3, sites=("tau", "m"), progress=False)
    assert (drawn.m.std("sample") < 1e-6).all()
    assert float(fit.guide.weights.medians()["tau"]) == pytest.approx(float(drawn.tau[0]))
    assert not list(pyro.get_param_store())


def test_an_encoder_that_the_prior_shares_is_no_hindrance():
    prior = ps.priors.VampPrior(N_GENES, 3, components=4, n_hidden=8, n_layers=1)
    model = made(prior=prior, weight_priors={"decoder.heads.log_mean.weight": ps.weights.NormalWeights()})
    assert quick(model, ps.guides.DiagonalNormal(model, global_guide=AutoNormal)).guide.own_encoder is None


def test_svi_by_hand_and_two_models_of_one_session():
    models = [DONORS() for _ in range(2)]
    guides = [ps.guides.DiagonalNormal(model, global_guide=AutoMultivariateNormal) for model in models]
    guides.append(copy.deepcopy(guides[0]))
    before = [{name: value.clone() for name, value in one.weights.state_dict().items()} for one in guides]
    x = torch.as_tensor(np.asarray(cells().counts)).float()
    with pyro.get_param_store().scope():
        svi = SVI(models[0], guides[0], pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        for _ in range(3):
            svi.step(x)
        names = set(pyro.get_param_store())
        assert all(name.startswith((models[0].pyro_name + "$$$", guides[0].pyro_name + "$$$")) for name in names)
        Trace_ELBO().loss(models[1], guides[1], x)
        assert {name for name in set(pyro.get_param_store()) - names if guides[0].pyro_name in name} == set()
    changed = [
        [not torch.equal(value, one.weights.state_dict()[name]) for name, value in then.items()]
        for one, then in zip(guides, before, strict=True)
    ]
    assert all(changed[0])
    assert not any(changed[1])
    assert not any(changed[2])


def test_copies_and_pickles():
    model = DONORS()
    fit = quick(model, ps.guides.DiagonalNormal(model, global_guide=AutoMultivariateNormal))
    own = fit.guide
    copied, pickled = copy.deepcopy(own), pickle.loads(pickle.dumps(own))
    assert len({one.pyro_name for one in (own, copied, pickled)}) == 3
    for other in (copied, pickled):
        for name, value in own.weights.medians().items():
            torch.testing.assert_close(other.weights.medians()[name], value)
    with torch.no_grad():
        next(copied.weights.parameters()).add_(1.0)
    assert float(copied.weights.medians()["m"][0] - own.weights.medians()["m"][0]) == pytest.approx(1.0, abs=1e-5)
    again = quick(copied.model, copied)
    assert again.guide.pyro_name not in {one.pyro_name for one in (own, copied, pickled)}
    assert again.guide.model is again.model is not copied.model


def test_precision_follows_the_guide():
    guide = ps.guides.DiagonalNormal(DONORS(), global_guide=AutoMultivariateNormal).double()
    assert {value.dtype for value in (guide.weights.draws(2) | guide.weights.medians()).values()} == {torch.float64}


# --- the weight of the divergence ---


def test_the_weight_of_the_divergence_is_for_latents_of_cells_only():
    """Equal draws, so that losses at weights 1, 1/2 and 0 lie on a line whose slope is the divergence of z alone."""
    x = torch.as_tensor(np.asarray(cells().counts)).float()
    for kind in (AutoMultivariateNormal, AutoNormal, None):
        model = DONORS().eval()
        guide = ps.guides.InverseAutoregressiveFlow(model, global_guide=kind).eval()
        losses, slope = [], 0.0
        for weight in (1.0, 0.5, 0.0):
            tempered = TemperedLatents(weight, {*guide.coordinates.local})
            torch.manual_seed(0)
            with torch.no_grad(), pyro.get_param_store().scope(), tempered:
                losses.append(MeanFieldELBO().loss(model, guide, x))
        torch.manual_seed(0)
        with torch.no_grad(), pyro.get_param_store().scope():
            guided = pyro.poutine.trace(guide).get_trace(x)
            modelled = pyro.poutine.trace(pyro.poutine.replay(model, trace=guided)).get_trace(x)
            for trace, sign in ((guided, 1), (modelled, -1)):
                trace.compute_log_prob()
                of_cells = [n for n in trace.stochastic_nodes if n in (*guide.coordinates.local, "_flow")]
                slope += sign * sum(float(trace.nodes[name]["log_prob"].sum()) for name in of_cells)
        assert losses[0] - losses[2] == pytest.approx(2 * (losses[0] - losses[1]), abs=1e-3)
        if set(guide.coordinates.local) == {"z"}:
            assert losses[0] - losses[2] == pytest.approx(slope, rel=1e-4)


# --- saves ---


@pytest.mark.parametrize("make", [AutoMultivariateNormal, partial(AutoNormal, init_scale=0.01)])
def test_saves_are_loaded_with_a_guide_made_in_the_same_way(make, tmp_path):
    model = DONORS()
    fit = quick(model, ps.guides.DiagonalNormal(model, global_guide=make))
    fit.save(tmp_path / "fit")
    again = DONORS()
    with pytest.raises(CheckpointError, match=r"autoguide.*pass model="):
        ps.load(tmp_path / "fit", model=again)
    with pytest.raises(CheckpointError, match="weights differ"):
        ps.load(tmp_path / "fit", model=again, guide=ps.guides.DiagonalNormal(again))
    loaded = ps.load(tmp_path / "fit", model=again, guide=ps.guides.DiagonalNormal(again, global_guide=make))
    tables = [ps.evidence(one, cells().take([0]), samples=20, steps=3, progress=False) for one in (fit, loaded)]
    pd.testing.assert_frame_equal(*tables)


def test_independent_normals_keep_their_names_in_saves():
    names = [name for name in ps.guides.DiagonalNormal(DONORS()).state_dict() if name.startswith("weights.")]
    assert names == ["weights.loc.0", "weights.loc.1", "weights.log_scale.0", "weights.log_scale.1"]


# --- refusals ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (AutoDelta, "AutoDelta has no density"),
        (AutoIAFNormal, "AutoIAFNormal, which is not supported"),
        (AutoGaussian, "AutoGaussianDense, which is not supported"),
        (AutoGuideList, "AutoGuideList, which is not supported"),
        (AutoLaplaceApproximation, "AutoLaplaceApproximation, which is not supported"),
        (AutoNormalMessenger, "AutoNormalMessenger, which is not supported"),
        (lambda program: program, "which is not supported"),
        (AutoNormal(lambda: None), "must be what makes an autoguide"),
        ("AutoNormal", "must be what makes an autoguide"),
        (lambda program: AutoNormal(pyro.poutine.block(program, hide=["m"])), "and the program samples"),
    ],
)
@pytest.mark.filterwarnings("ignore:The `init_loc_fn` argument")
def test_what_will_not_do_is_refused_by_name(make, message):
    with pytest.raises(ModelError, match=message):
        ps.guides.DiagonalNormal(DONORS(), global_guide=make)


def test_without_global_latents_there_is_nothing_to_be_over():
    with pytest.raises(ModelError, match="global_guide= is for models with global latents"):
        ps.guides.DiagonalNormal(made(), global_guide=AutoNormal)
