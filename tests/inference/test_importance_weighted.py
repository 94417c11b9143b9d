"""The importance-weighted bound against sums by SciPy, Pyro's own bounds, and exact evidence on a grid."""

import inspect

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.poutine.messenger import Messenger
from scipy import stats
from scipy.special import logsumexp

import pyro_scvi as ps
from pyro_scvi.errors import CheckpointError, ModelError
from pyro_scvi.training.options import TrainingOptions
from tests.support.toys import (
    N_GENES,
    SHIFTS,
    WEIGHTS,
    Chain,
    Cluster,
    Effect,
    Positive,
    cells_of,
    grid_of,
    of_values,
    on_line,
    toy,
)

pytestmark = pytest.mark.fast

KINDS = {"z": ps.SCVI, "e": Effect, "c": Cluster, "c, d": Chain, "bounded": Positive}
ROWS = torch.tensor([4, 0, 5])


class Shared(Effect):
    """What all cells have in common, beside two latents of each."""

    def forward(self, *args, **options):
        self.level = pyro.sample("m", dist.Normal(torch.zeros(2).double(), 0.7).to_event(1))
        return super().forward(*args, **options)

    def more(self):
        return super().more() + self.level.sum()


class Recorded(Messenger):
    """The first value of each site: that of the guide."""

    def __init__(self):
        super().__init__()
        self.values = {}

    def _pyro_post_sample(self, msg):
        self.values.setdefault(msg["name"], msg["value"].detach())


def data_of(n=6):
    return tuple(one.double() for one in cells_of(n)[:])


def loss_of(elbo, model, guide, *, seed=1, x_and_gamma=None, **batch):
    """The loss and its gradients by name."""
    parts = torch.nn.ModuleList([model, guide])
    parts.zero_grad()
    torch.manual_seed(seed)
    with pyro.get_param_store().scope():
        loss = elbo.loss_and_grads(model, guide, *(x_and_gamma or data_of()), **batch)
    return loss, {name: p.grad.clone() for name, p in parts.named_parameters() if p.grad is not None}


def made(kind=Shared, guide=ps.guides.DiagonalNormal, **options):
    model = toy(kind)
    return model, guide(model, **options).double()


@pytest.mark.parametrize("draws", [1, 7])
def test_the_value_is_that_of_sums_by_scipy(draws):
    model, guide = made()
    x, gamma = (one[ROWS] for one in data_of())
    torch.manual_seed(0)
    with Recorded() as seen, torch.no_grad():
        elbo = ps.elbos.ImportanceWeighted(draws)
        found = -elbo.differentiable_loss(model, guide, x, gamma, index=ROWS, n_cells=30).item()
        code = guide.encode(x, gamma, None)
        eta = model.decoder(seen.values["z"][:, :, 0], gamma)["log_mean"].numpy()  # (draws, cells, genes)
    z, e, m = (seen.values[name].numpy() for name in ("z", "e", "m"))
    assert z.shape == (draws, 3, 1, 1)
    assert e.shape == (draws, 3, 1)
    log_w = stats.norm.logpdf(z[..., 0, 0]) + stats.norm.logpdf(e[..., 0])
    log_w += stats.poisson.logpmf(x.numpy(), np.exp(eta + e + m.sum())).sum(-1)
    for name, value in (("z", z[..., 0, 0]), ("e", e[..., 0])):
        log_w -= stats.norm.logpdf(value, *(of[name][:, 0].numpy() for of in (code.loc, code.scale)))
    of_cells = logsumexp(log_w, 0) - np.log(draws)
    q = (guide.weights.loc[0].detach().numpy(), np.exp(guide.weights.log_scale[0].detach().numpy()))
    expected = of_cells.sum() * 30 / 3 + (stats.norm.logpdf(m, 0, 0.7) - stats.norm.logpdf(m, *q)).sum()
    assert found == pytest.approx(expected, rel=1e-10)


GUIDES = {
    "diagonal": ps.guides.DiagonalNormal,
    "full rank": ps.guides.FullRankNormal,
    "flow": ps.guides.InverseAutoregressiveFlow,
    "per cell": lambda model, **options: ps.guides.PerCell(model, 6, **options),
    "joint globals": lambda model: ps.guides.DiagonalNormal(model, global_guide=AutoMultivariateNormal),
}


@pytest.mark.parametrize("guide", GUIDES)
def test_one_draw_is_pyros_bound(guide):
    model, guide = made(guide=GUIDES[guide])
    expected = loss_of(Trace_ELBO(), model, guide)
    found = loss_of(ps.elbos.ImportanceWeighted(1), model, guide)
    assert found[0] == pytest.approx(expected[0], rel=1e-10)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_one_draw_is_pyros_bound_for_every_program(kind):
    model, guide = made(KINDS[kind])
    elbo = TraceEnum_ELBO(max_plate_nesting=2) if guide.coordinates.enumerated else Trace_ELBO()
    expected, _ = loss_of(elbo, model, guide)
    assert loss_of(ps.elbos.ImportanceWeighted(1), model, guide)[0] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("batch", [{"index": ROWS, "n_cells": 30}, {"mask": torch.arange(N_GENES) % 2 > 0}])
def test_minibatches_and_masks_are_those_of_pyro(batch):
    parts, data = made(), tuple(one[ROWS] for one in data_of())
    expected, _ = loss_of(Trace_ELBO(), *parts, x_and_gamma=data, **batch)
    found, _ = loss_of(ps.elbos.ImportanceWeighted(1), *parts, x_and_gamma=data, **batch)
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", [Effect, Cluster])
def test_more_draws_come_nearer_to_the_evidence_from_below(kind):
    model, guide = made(kind)
    points = on_line(stats.norm(), -7, 7, 300)
    if kind is Effect:
        grid = grid_of(model, cells_of(6), {"z": points, "e": points}, lambda latents: latents["e"])
    else:
        axes = {"z": points, "c": of_values(WEIGHTS)}
        grid = grid_of(model, cells_of(6), axes, lambda latents: SHIFTS.numpy()[latents["c"]])
    exact = grid.log_evidence.sum()
    mean, se = {}, {}
    for draws, times in ((1, 200), (100, 50), (10000, 6)):
        elbo = ps.elbos.ImportanceWeighted(draws)
        with torch.no_grad(), pyro.get_param_store().scope():
            torch.manual_seed(2)
            bounds = [-elbo.loss(model, guide, *data_of()) for _ in range(times)]
        mean[draws], se[draws] = np.mean(bounds), np.std(bounds) / np.sqrt(times)
    assert mean[1] < mean[100] - 3 * se[100]
    assert mean[100] < exact + 3 * se[100]
    assert abs(mean[10000] - exact) < 3 * se[10000] + 0.02


@pytest.mark.parametrize("guide", ["diagonal", "full rank", "joint globals"])
def test_gradients_are_those_of_finite_differences(guide):
    model, guide = made(guide=GUIDES[guide])
    elbo, batch = ps.elbos.ImportanceWeighted(5), {"index": torch.arange(6), "n_cells": 12}
    _, gradients = loss_of(elbo, model, guide, **batch)
    parts = dict(torch.nn.ModuleList([model, guide]).named_parameters())
    for name, gradient in gradients.items():
        place, step = int(gradient.abs().argmax()), 1e-5
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parts[name].view(-1)[place] += sign * step
            sides.append(loss_of(elbo, model, guide, **batch)[0])
            with torch.no_grad():
                parts[name].view(-1)[place] -= sign * step
        slope = (sides[0] - sides[1]) / (2 * step)
        assert slope == pytest.approx(float(gradient.view(-1)[place]), rel=1e-4, abs=1e-4), name


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # by Pyro's own checks
@pytest.mark.parametrize("guide", ["diagonal", "full rank"])
def test_draws_at_which_the_density_overflows_have_no_weight_and_no_gradient(guide):
    """exp(e) is infinite for most draws of e, and finite for one of thousands."""
    model, guide = made(Effect, guide=GUIDES[guide])
    with torch.no_grad():
        guide.heads[0].bias[1] = 7.0  # a standard deviation of 1,000; the largest number is exp(709)
    loss, gradients = loss_of(ps.elbos.ImportanceWeighted(300), model, guide)
    assert np.isfinite(loss)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_fit_goes_on_where_single_draws_overflow():
    model, guide = made(Effect)
    with torch.no_grad():
        guide.heads[0].bias[1] = 5.3  # a standard deviation of 200, so that exp(e) is infinite for some draws in 2,000
    options = {"epochs": 1, "validation": 0, "dtype": torch.float64, "progress": False}
    fit = ps.fit(model, cells_of(6), guide, elbo=ps.elbos.ImportanceWeighted(3000), **options)
    assert np.isfinite(fit.history.train_loss).all()


@pytest.mark.parametrize("kind", [*KINDS.values(), Shared])
@pytest.mark.parametrize("guide", GUIDES)
def test_fit_takes_it_with_every_guide_and_program(guide, kind):
    model = toy(kind)
    shares = guide == "joint globals" and kind is not Shared
    if shares or (guide == "flow" and kind not in (Effect, Positive, Shared)):
        pytest.skip("no global latent, or a single latent of the cells")
    options = {"epochs": 2, "batch_size": 4, "validation": 0, "dtype": torch.float64, "progress": False}
    fit = ps.fit(model, cells_of(6), GUIDES[guide](model), elbo=ps.elbos.ImportanceWeighted(3), **options)
    assert np.isfinite(fit.history.train_loss).all()


@pytest.mark.parametrize("guide", ["diagonal", "joint globals"])
def test_svi_trains_with_it(guide):
    """Pyro's own loop finds the parameters of both programs."""
    model, guide = made(guide=GUIDES[guide])
    before = {name: p.detach().clone() for part in (model, guide) for name, p in part.named_parameters()}
    with pyro.get_param_store().scope():
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ps.elbos.ImportanceWeighted(3))
        losses = [svi.step(*data_of()) for _ in range(60)]
    moved = {name: p for part in (model, guide) for name, p in part.named_parameters()}
    assert all(not torch.equal(moved[name], before[name]) for name in before)
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def run(folder, **changes):
    options = {"epochs": 4, "batch_size": 8, "validation": 0, "dtype": torch.float64, "progress": False}
    options |= {"elbo": ps.elbos.ImportanceWeighted(3), "checkpoint": folder} | changes
    return ps.fit(toy(Shared), cells_of(16), **options)


class Stopped(Exception):
    """By the callback of a run."""


def stop_after_two(epoch, row, fit):
    if epoch == 2:
        raise Stopped


def test_a_resumed_run_is_the_run_itself(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "run", callbacks=[stop_after_two])
    resumed = run(tmp_path / "run", resume=True)
    pd.testing.assert_frame_equal(*(fit.history.drop(columns="seconds") for fit in (whole, resumed)), check_exact=True)
    for one, other in zip(whole.guide.parameters(), resumed.guide.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_other_draws_is_refused(tmp_path):
    run(tmp_path / "run", epochs=1)
    with pytest.raises(CheckpointError, match="elbo"):
        run(tmp_path / "run", epochs=1, resume=True, elbo=ps.elbos.ImportanceWeighted(4))
    with pytest.raises(CheckpointError, match="elbo"):
        run(tmp_path / "run", epochs=1, resume=True, elbo=None)


@pytest.mark.parametrize("draws", [0, -1, 2.5, True, "many"])
def test_draws_are_an_integer_of_1_or_more(draws):
    with pytest.raises(ModelError, match="draws must be an integer of 1 or more"):
        ps.elbos.ImportanceWeighted(draws)


def test_points_have_no_weights():
    model = toy()
    guide, elbo = ps.guides.Point(model).double(), ps.elbos.ImportanceWeighted(3)
    with pytest.raises(ModelError, match="Point has none: take a guide that has"):
        ps.fit(model, cells_of(), guide, elbo=elbo, progress=False)
    with pytest.raises(ModelError, match="Point has none: take a guide that has"):
        elbo.loss(model, guide, *data_of())


def test_a_weight_of_the_divergence_is_refused():
    options = {"elbo": ps.elbos.ImportanceWeighted(3), "epochs": 4, "progress": False}
    for weight in (ps.schedules.ConstantKL(0.5), ps.schedules.WarmUp(2)):
        with pytest.raises(ModelError, match="no KL divergence that could be weighed: leave kl_weight= out"):
            ps.fit(toy(), cells_of(), kl_weight=weight, **options)


def test_the_repr_tells_the_draws():
    assert repr(ps.elbos.ImportanceWeighted(7)) == "ImportanceWeighted(draws=7)"


def test_ranks_with_other_draws_are_told_which():
    options = {name: option.default for name, option in inspect.signature(ps.fit).parameters.items()}
    model, cells = toy(), cells_of()

    def told(elbo):
        asked = TrainingOptions.among(options | {"elbo": elbo, "device": torch.device("cpu")})
        return asked.for_ranks(model, ps.guides.DiagonalNormal(model), cells)["elbo"]

    assert told(ps.elbos.ImportanceWeighted(3)) == "ImportanceWeighted(draws=3)"
    assert told(ps.elbos.ImportanceWeighted(4)) == "ImportanceWeighted(draws=4)"
    assert told(Trace_ELBO()) == told(Trace_ELBO()) == "Trace_ELBO"
