"""Plain Pyro works on model and guide: every tool a statistician would reach for, and several models in one session."""

import copy
import os
import subprocess
import sys
from importlib import import_module

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO, infer_discrete
from pyro.infer.inspect import get_dependencies, get_model_relations

import pyro_scvi as ps
from pyro_scvi.distributions.negative_binomial import NegativeBinomial
from pyro_scvi.errors import ModelError
from pyro_scvi.model import cells_plate, check_inputs
from tests.support.paths import ROOT
from tests.support.simulate import simulated_counts


@pytest.fixture
def pair(cells):
    """A small model, its guide and the counts."""
    model = ps.SCVI(cells.n_genes, 3, n_hidden=8)
    return model, ps.guides.DiagonalNormal(model, n_hidden=8), cells[:][0]


# --- stochastic variational inference ---

ELBOS = [Trace_ELBO(), TraceMeanField_ELBO(), RenyiELBO(alpha=0.5, num_particles=3)]


# The closed-form KL divergences of TraceMeanField_ELBO need a guide that factorises: not that of h, w and y.
@pytest.mark.parametrize(
    ("elbo", "marginal"),
    [(elbo, True) for elbo in ELBOS] + [(ELBOS[0], False), (ELBOS[2], False)],
    ids=lambda value: str(value) if isinstance(value, bool) else type(value).__name__,
)
def test_svi_trains_model_and_guide(elbo, marginal, pair):
    model, guide, x = pair
    before = [p.detach().clone() for part in (model, guide) for p in part.parameters()]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step(x, marginal=marginal) / len(x) for _ in range(25)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 2
    after = [p.detach() for part in (model, guide) for p in part.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_svi_on_minibatches(pair):
    model, guide, x = pair
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.02}), Trace_ELBO())
    losses = []
    for _ in range(10):
        for rows in torch.randperm(60).split(20):
            losses.append(svi.step(x[rows], index=rows, n_cells=60) / 60)
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 2


# --- handlers ---


def test_condition_and_trace(pair):
    model, _, x = pair
    z = torch.randn(60, 1, 3)
    trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(x)
    assert trace.nodes["z"]["value"] is z
    assert trace.nodes["z"]["is_observed"]
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], dist.Normal(0, 1).log_prob(z).sum(-1))
    assert trace.nodes["x"]["log_prob"].shape == (60, 20)


def test_do_without_technical_zeros_is_the_negative_binomial(pair):
    model, _, _x = pair
    gamma = torch.zeros(20_000, 0)
    latents = {"z": torch.zeros(20_000, 1, 3), "l": torch.full((20_000, 1), 40.0)}
    intervened = poutine.do(poutine.condition(model.eval(), data=latents), data={"h": torch.zeros(20_000, 20)})
    trace = poutine.trace(intervened).get_trace(None, gamma, marginal=False)
    assert torch.equal(trace.nodes["x"]["value"], trace.nodes["y"]["value"])
    theta = model.decode(latents["z"][:1], latents["l"][:1].log(), gamma[:1])
    counts = NegativeBinomial(theta["log_mean"], theta["log_inverse_dispersion"])
    gap = (trace.nodes["x"]["value"].mean(0) - counts.mean) / (counts.variance / 20_000).sqrt()
    assert gap.abs().max() < 5


def test_block_hides_sites(pair):
    model, guide, x = pair
    trace = poutine.trace(poutine.block(model, hide=["w", "y", "h"])).get_trace(x, marginal=False)
    assert {"z", "l", "x"} <= set(trace.stochastic_nodes) | set(trace.observation_nodes)
    assert not {"w", "y", "h"} & set(trace.nodes)
    with poutine.block(), poutine.trace() as outer:
        guide(x)
    assert "z" in outer.trace.nodes  # a block hides from handlers outside it only
    with poutine.trace() as outer, poutine.block():
        guide(x)
    assert not outer.trace.nodes


class MaskCounts(poutine.messenger.Messenger):
    """Leaves entries of x out, and nothing else: a mask over the whole model would count z once per gene."""

    def __init__(self, mask):
        self.mask = mask

    def _pyro_sample(self, msg):
        if msg["name"] == "x":
            msg["mask"] = self.mask if msg["mask"] is None else self.mask & msg["mask"]


def test_mask_of_the_caller_and_of_the_model_agree(pair):
    model, guide, x = pair
    mask = torch.rand(x.shape) < 0.6
    q = poutine.trace(guide).get_trace(x)
    replayed = poutine.replay(model.eval(), trace=q)
    by_argument = poutine.trace(replayed).get_trace(x, mask=mask).log_prob_sum()
    by_handler = poutine.trace(MaskCounts(mask)(replayed)).get_trace(x).log_prob_sum()
    torch.testing.assert_close(by_handler, by_argument)
    full = poutine.trace(replayed).get_trace(x)
    full.compute_log_prob()
    left_out = (full.nodes["x"]["log_prob"] * ~mask).sum()
    torch.testing.assert_close(full.log_prob_sum() - left_out, by_argument)


def test_replay_repeats_the_guide_s_draws(pair):
    model, guide, x = pair
    q = poutine.trace(guide).get_trace(x, marginal=False)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(x, marginal=False)
    for site in ("z", "l", "w", "y", "h"):
        assert p.nodes[site]["value"] is q.nodes[site]["value"]


def test_scale_scales_every_site(pair):
    model, guide, x = pair
    q = poutine.trace(guide).get_trace(x)
    replayed = poutine.replay(model.eval(), trace=q)
    plain, scaled = (poutine.trace(m).get_trace(x).log_prob_sum() for m in (replayed, poutine.scale(replayed, 0.25)))
    torch.testing.assert_close(scaled, 0.25 * plain)


# --- prediction, MCMC, discrete inference, the picture ---


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("marginal", [False, True])
def test_predictive_from_the_prior(parallel, marginal, pair):
    model = pair[0].eval()
    draws = Predictive(model, num_samples=5, parallel=parallel)(None, torch.zeros(6, 0), marginal=marginal)
    assert draws["x"].shape == (5, 6, 20)
    assert draws["z"].reshape(5, 6, 3).std(0).min() > 0
    if not marginal:
        assert torch.equal(draws["x"], draws["y"] * (1 - draws["h"]))


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_of_the_posterior(parallel, pair):
    model, guide, x = pair
    for part in (model, guide):
        part.eval()
    q = Predictive(guide, num_samples=400, parallel=parallel)(x)
    assert q["z"].reshape(400, 60, 3).shape == (400, 60, 3)
    samples = {site: q[site].detach() for site in ("z", "l")}
    predicted = Predictive(model, samples, return_sites=["x"], parallel=parallel)(None, torch.zeros(60, 0))["x"]
    assert predicted.shape == (400, 60, 20)
    theta = model.decode(samples["z"], samples["l"].log(), torch.zeros(60, 0))
    law = model.likelihood.marginal(**theta)
    gap = (predicted - law.mean).mean(0) / (law.variance.mean(0) / 400).sqrt()
    assert gap.abs().mean() < 1
    assert gap.mean().abs() < 5 / 1200**0.5


def test_predictive_parallel_and_not_have_the_same_law(pair):
    model = pair[0].eval()
    z = torch.zeros(3000, 4, 1, 3)
    size = torch.full((3000, 4, 1), 30.0)
    means = [
        Predictive(model, {"z": z, "l": size}, return_sites=["x"], parallel=parallel)(None, torch.zeros(4, 0))["x"]
        for parallel in (False, True)
    ]
    gap = means[0].mean((0, 1)) - means[1].mean((0, 1))
    assert (gap / (2 * means[0].var((0, 1)) / 12_000).sqrt()).abs().max() < 5


def test_nuts_on_z(cells):
    model = ps.SCVI(cells.n_genes, 2, library=ps.libraries.ObservedLibrary(), n_hidden=8).eval()
    x = cells[:4][0]
    mcmc = MCMC(
        NUTS(model, max_tree_depth=4),
        num_samples=30,
        warmup_steps=60,
        initial_params={"z": torch.zeros(4, 1, 2)},
        disable_progbar=True,
    )
    mcmc.run(x)
    z = mcmc.get_samples()["z"]
    assert z.shape == (30, 4, 1, 2)
    assert torch.isfinite(z).all()
    assert z.std(0).min() > 0.2


def enumerated(model):
    """The program with h enumerated, built from the parts of the model."""

    def program(x, gamma=None):
        gamma = check_inputs(model, x, gamma)
        with cells_plate(gamma, None, None):
            theta = model.decode(pyro.sample("z", model.prior()), model.library(x, gamma), gamma)
            gate = theta.pop("gate_logits")
            with pyro.plate("genes", model.n_genes, dim=-1):
                h = pyro.sample("h", dist.Bernoulli(logits=gate), infer={"enumerate": "parallel"})
                # Counts where h = 0, else surely zero.
                counts = NegativeBinomial(**theta).mask(h == 0)
                pyro.sample("x", counts, obs=x)
                pyro.factor("lost", torch.where((h == 1) & (x > 0), -1e3, 0.0))

    return program


def test_infer_discrete_draws_h_from_its_exact_conditional(cells):
    model = ps.SCVI(cells.n_genes, 2, n_hidden=8).eval()
    n = 5000
    x = cells[1:2][0].expand(n, -1)
    latents = {"z": torch.randn(1, 1, 2).expand(n, 1, 2), "l": x.sum(-1, keepdim=True)}
    program = poutine.condition(enumerated(model), data=latents)
    inferred = infer_discrete(program, first_available_dim=-3, temperature=1)
    h = poutine.trace(inferred).get_trace(x).nodes["h"]["value"]
    theta = model.decode(latents["z"][:1], latents["l"][:1].log(), torch.zeros(1, 0))
    rho = torch.sigmoid(model.likelihood.technical_zero_logits(**theta)) * (x[0] == 0)
    assert (x[0] == 0).sum() > 2
    assert ((h.mean(0) - rho).abs() <= 5 * (rho * (1 - rho) / n).sqrt() + 1e-6).all()


FIGURE_1 = {("z", "w"), ("w", "y"), ("z", "h"), ("y", "x"), ("h", "x")}


def test_render_model_draws_the_paper_s_figure_1(cells):
    graphviz = pytest.importorskip("graphviz")
    model = ps.SCVI(cells.n_genes, 3, library=ps.libraries.NoLibrary(), n_hidden=8)
    args = (cells[:5][0], torch.zeros(5, 0))
    picture = pyro.render_model(model, model_args=args, model_kwargs={"marginal": False})
    assert isinstance(picture, graphviz.Digraph)
    drawn = {tuple(line.replace(" ", "").replace('"', "").split("->")) for line in picture.body if "->" in line}
    assert {tuple(end.strip() for end in edge) for edge in drawn} == FIGURE_1
    relations = get_model_relations(model, model_args=args, model_kwargs={"marginal": False})
    assert relations["observed"] == ["x"]
    assert relations["plate_sample"] == {"cells": ["z", "w", "y", "h", "x"], "genes": ["w", "y", "h", "x"]}


def test_marginalised_program_links_z_and_x_alone(cells):
    model = ps.SCVI(cells.n_genes, 3, library=ps.libraries.NoLibrary(), n_hidden=8)
    relations = get_model_relations(model, model_args=(cells[:5][0],))
    assert relations["sample_sample"] == {"z": [], "x": ["z"]}
    posterior = get_dependencies(model, model_args=(cells[:5][0],))["posterior_dependencies"]
    assert set(posterior["z"]) == {"z", "x"}


# --- several models in one session ---

STEPS = {"svi": 8, "fit": 2}


def make_pair(which):
    """Model and guide number ``which``, of different priors and seeds."""
    prior = [ps.priors.StandardNormal(3), ps.priors.GaussianMixture(3, components=2)][which]
    model = ps.SCVI(20, 3, prior=prior, n_hidden=8, seed=which)
    return model, ps.guides.DiagonalNormal(model, n_hidden=8, seed=which)


def step_by_svi(which, model, guide, svi, cells, step):
    torch.manual_seed(10 * step + which)
    svi.step(cells[:][0])
    return model, guide


def step_by_fit(which, model, guide, svi, cells, step):
    fit = ps.fit(model, cells, guide, epochs=4, batch_size=30, seed=10 * step + which, progress=False)
    return fit.model, fit.guide


def train(way, numbers):
    """Train the pairs of these numbers in turns, and give their parameters and buffers."""
    cells = ps.Cells.from_counts(simulated_counts())
    pairs = {which: make_pair(which) for which in numbers}
    svis = {n: SVI(*pair, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO()) for n, pair in pairs.items()}
    take = {"svi": step_by_svi, "fit": step_by_fit}[way]
    for step in range(STEPS[way]):
        for which, (model, guide) in pairs.items():
            pairs[which] = take(which, model, guide, svis[which], cells, step)
    return {
        which: {f"{i}.{k}": v.numpy() for i, part in enumerate(pair) for k, v in part.state_dict().items()}
        for which, pair in pairs.items()
    }


def train_alone(folder):
    """Train every pair in a child of its own; what they need is imported before, and nothing trains in this process."""
    import_module("torch._dynamo")  # as optimisers do when they are made
    torch.set_num_threads(1)
    for way in STEPS:
        for which in (0, 1):
            child = os.fork()
            if not child:
                np.savez(f"{folder}/{way}-{which}.npz", **train(way, [which])[which])
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                sys.exit(f"{way} {which} failed")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of what processes of their own trained, started by one that imports what they need."""
    path = tmp_path_factory.mktemp("alone")
    call = f"import tests.system.test_plain_pyro as t; t.train_alone({str(path)!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", call], check=True, timeout=240, env=environment)
    return path


@pytest.mark.parametrize("way", STEPS)
def test_models_side_by_side_train_as_in_processes_of_their_own(way, alone):
    together = train(way, [0, 1])
    for which in (0, 1):
        own = dict(np.load(alone / f"{way}-{which}.npz"))
        start = {f"{i}.{k}": v.numpy() for i, part in enumerate(make_pair(which)) for k, v in part.state_dict().items()}
        assert together[which].keys() == own.keys()
        for name, value in together[which].items():
            np.testing.assert_allclose(value, own[name], rtol=1e-6, atol=1e-7, err_msg=name)
        changed = [name for name, value in own.items() if not np.array_equal(value, start[name])]
        assert len(changed) >= len(own) - 3  # all but what is constant


def test_training_a_copy_leaves_the_original_alone(cells):
    model, _ = make_pair(0)
    clone = copy.deepcopy(model)
    assert clone.pyro_name != model.pyro_name
    before = copy.deepcopy(model.state_dict())
    guide = ps.guides.DiagonalNormal(clone, n_hidden=8)
    svi = SVI(clone, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(3):
        svi.step(cells[:][0])
    fit = ps.fit(clone, cells, guide, epochs=2, progress=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, parameter in fit.model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_a_copied_guide_belongs_to_a_copied_model(cells):
    model, guide = make_pair(0)
    clone_model, clone = copy.deepcopy((model, guide))
    assert clone.model is clone_model
    before = copy.deepcopy(guide.state_dict())
    ps.fit(clone_model, cells, clone, epochs=2, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


def test_fit_leaves_parameter_store_and_random_state_alone(cells):
    model, guide = make_pair(0)
    state = torch.get_rng_state()
    ps.fit(model, cells, guide, epochs=2, progress=False)
    assert not list(pyro.get_param_store().keys())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_parameter_that_pyro_alone_knows_is_refused(cells):
    def prior():
        return dist.Normal(pyro.param("center", torch.zeros(3)), 1.0).to_event(1)

    with pytest.raises(ModelError, match="'center' is a pyro.param, which fit would never train"):
        ps.fit(ps.SCVI(cells.n_genes, 3, prior=prior, n_hidden=8), cells, epochs=2, progress=False)
    assert not list(pyro.get_param_store().keys())


def test_a_latent_that_the_guide_lacks_is_refused(cells):
    def prior():
        return dist.Normal(torch.zeros(3), pyro.sample("spread", dist.HalfNormal(1.0))[..., None]).to_event(1)

    model = ps.SCVI(cells.n_genes, 3, prior=lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1), n_hidden=8)
    guide = ps.guides.DiagonalNormal(model)
    model.prior = prior
    with pytest.raises(ModelError, match="the model samples .'spread'., which the guide does not"):
        ps.fit(model, cells, guide, epochs=2, progress=False)


def test_a_parameter_without_a_part_in_the_loss_is_refused(cells):
    model, guide = make_pair(0)
    model.unused = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ModelError, match="unused"):
        ps.fit(model, cells, guide, epochs=2, progress=False)


def test_a_guide_of_another_model_is_refused(cells):
    model, _ = make_pair(0)
    _, guide = make_pair(1)
    with pytest.raises(ModelError, match="another model|different model|other model"):
        ps.fit(model, cells, guide, epochs=1, progress=False)
