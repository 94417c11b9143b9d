"""SCVI: the marginalised, the explicit and the enumerated program are one law; shapes, masks, scales, errors."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

import pyro_scvi as ps
from pyro_scvi.distributions.negative_binomial import NegativeBinomial
from pyro_scvi.distributions.zero_inflated import ZeroInflated
from pyro_scvi.errors import ModelError
from pyro_scvi.model import cells_plate, check_inputs
from pyro_scvi.priors.base import Prior

LIKELIHOODS = [ps.likelihoods.ZINB, ps.likelihoods.NB, ps.likelihoods.ZIP, ps.likelihoods.Poisson]
LIBRARIES = [ps.libraries.NoLibrary, ps.libraries.ObservedLibrary, ps.libraries.LatentLibrary]


def make(cells, dtype=torch.float64, **options):
    """A small model and its guide in eval mode, with the counts and covariates of the cells."""
    model = ps.SCVI(cells.n_genes, 3, cells.n_covariates, n_hidden=8, **options)
    guide = ps.guides.DiagonalNormal(model, n_hidden=8)
    for part in (model, guide):
        part.to(dtype).eval()
    x, gamma = (t.to(dtype) for t in cells[:])
    return model, guide, x, gamma


def seeded_loss(elbo, model, guide, *args, **kwargs):
    torch.manual_seed(7)
    return elbo.differentiable_loss(model, guide, *args, **kwargs)


# --- one law in three forms ---


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_explicit_and_marginalised_bounds_agree_at_one_seed(likelihood, library, batched_cells):
    model, guide, x, gamma = make(batched_cells, likelihood=likelihood(), library=library())
    marginal = seeded_loss(Trace_ELBO(), model, guide, x, gamma).item()
    explicit = seeded_loss(Trace_ELBO(), model, guide, x, gamma, marginal=False).item()
    assert explicit == pytest.approx(marginal, rel=1e-9)


def test_explicit_and_marginalised_bounds_agree_under_masks_minibatches_and_random_weights(batched_cells):
    priors = {"decoder.heads.*.weight": ps.weights.NormalWeights()}
    model, guide, x, gamma = make(batched_cells, weight_priors=priors)
    rows, mask = torch.arange(10, 30), torch.rand(20, 20) < 0.7
    options = {"mask": mask, "index": rows, "n_cells": 60}
    losses = [
        seeded_loss(Trace_ELBO(), model, guide, x[rows], gamma[rows], marginal=marginal, **options).item()
        for marginal in (True, False)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def enumerated(model):
    """The program with h enumerated, w and y integrated out: a face between the two, from the likelihood's laws."""

    def program(x, gamma=None):
        pyro.module(model.pyro_name, model)
        gamma = check_inputs(model, x, gamma)
        with cells_plate(gamma, None, None):
            theta = model.decode(pyro.sample("z", model.prior()), model.library(x, gamma), gamma)
            gate = theta.pop("gate_logits")
            counts = ps.likelihoods.NB().marginal(**theta)
            with pyro.plate("genes", model.n_genes, dim=-1):
                h = pyro.sample("h", dist.Bernoulli(logits=gate), infer={"enumerate": "parallel"})
                pyro.sample("x", ZeroInflated(counts, torch.where(h == 1, 1e3, -1e3)), obs=x)

    return program


@pytest.mark.parametrize("library", LIBRARIES)
def test_enumerating_h_gives_the_same_bound_and_gradients(library, cells):
    model, guide, x, gamma = make(cells, library=library())
    losses, gradients = [], []
    for elbo, program in ((Trace_ELBO(), model), (TraceEnum_ELBO(max_plate_nesting=2), enumerated(model))):
        loss = seeded_loss(elbo, program, guide, x, gamma)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(model.decoder.parameters())))
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_the_explicit_guide_is_exact_for_every_draw_of_z(cells):
    model, guide, x, gamma = make(cells)
    q = poutine.trace(guide).get_trace(x, gamma, marginal=False)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(x, gamma, marginal=False)
    m = poutine.trace(poutine.replay(model, trace=q)).get_trace(x, gamma)
    for trace in (q, p, m):
        trace.compute_log_prob()
    gap = sum(p.nodes[s]["log_prob"] for s in "wyhx") - sum(q.nodes[s]["log_prob"] for s in "wyh")
    torch.testing.assert_close(gap, m.nodes["x"]["log_prob"], rtol=0, atol=1e-9)


# --- shapes and sampling ---


@pytest.mark.parametrize("marginal", [True, False])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_sites_shapes_and_support(likelihood, library, marginal):
    model = ps.SCVI(7, 3, 2, likelihood=likelihood(), library=library(), n_hidden=8)
    trace = poutine.trace(model).get_trace(None, torch.randn(5, 2), marginal=marginal)
    sites = set(trace.stochastic_nodes) - {"cells", "genes"}
    expected = {"z", "x"} | ({"l"} if model.library.latent else set())
    if not marginal:
        expected |= {"y"} | ({"h"} & set("h" if "gate_logits" in model.likelihood.heads else ""))
        expected |= {"w"} if "log_inverse_dispersion" in model.likelihood.heads else set()
    assert sites == expected
    assert trace.nodes["z"]["value"].shape == (5, 1, 3)
    assert all(trace.nodes[site]["value"].shape == (5, 7) for site in sites & set("wyhx"))
    x = trace.nodes["_RETURN"]["value"]
    assert torch.equal(x, x.round())
    assert (x >= 0).all()
    if {"y", "h"} <= sites:
        assert torch.equal(x, trace.nodes["y"]["value"] * (1 - trace.nodes["h"]["value"]))


def test_drawn_counts_follow_the_likelihood_at_the_drawn_latents():
    model = ps.SCVI(4, 2, library=ps.libraries.LatentLibrary(3.0, 0.5), n_hidden=8).double().eval()
    sites = {"z": torch.randn(1, 1, 2).double(), "l": torch.full((1, 1), 20.0).double()}
    fixed = {name: value.expand(20_000, *value.shape[1:]) for name, value in sites.items()}
    gamma = torch.zeros(20_000, 0).double()
    for marginal in (True, False):
        x = poutine.condition(model, data=fixed)(None, gamma, marginal=marginal)
        theta = model.decode(sites["z"], sites["l"].log(), gamma[:1])
        law = model.likelihood.marginal(**theta)
        assert ((x.mean(0) - law.mean) / (law.variance / 20_000).sqrt()).abs().max() < 5


def test_log_density_is_that_of_the_parts(batched_cells):
    model, _, x, gamma = make(batched_cells, prior=ps.priors.StudentT(3))
    trace = poutine.trace(model).get_trace(x, gamma)
    z, size = trace.nodes["z"]["value"], trace.nodes["l"]["value"]
    heads = model.decoder(z.squeeze(1), gamma)
    counts = NegativeBinomial(size.log() + heads["log_mean"].log_softmax(-1), heads["log_inverse_dispersion"])
    expected = (
        dist.StudentT(torch.tensor(4.0).double()).log_prob(z).sum()
        + dist.LogNormal(model.library.loc, model.library.scale).log_prob(size).sum()
        + ZeroInflated(counts, heads["gate_logits"]).log_prob(x).sum()
    )
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_covariates_reach_the_decoder(batched_cells):
    model, _, _, gamma = make(batched_cells)
    z, log_library = torch.zeros(60, 1, 3).double(), torch.zeros(60, 1).double()
    one, other = (model.decode(z, log_library, g)["log_mean"] for g in (gamma, gamma.flip(1)))
    assert (one - other).abs().max() > 1e-3


def test_decoder_takes_leading_sample_dimensions(batched_cells):
    model, _, _, gamma = make(batched_cells)
    z, log_library = torch.randn(2, 4, 60, 1, 3).double(), torch.zeros(60, 1).double()
    theta = model.decode(z, log_library, gamma)
    assert theta["log_mean"].shape == (2, 4, 60, 20)
    alone = model.decode(z[1, 2], log_library, gamma)
    torch.testing.assert_close(theta["gate_logits"][1, 2], alone["gate_logits"])


# --- masks and scales ---


@pytest.mark.parametrize("marginal", [True, False])
def test_mask_takes_entries_out_of_the_likelihood_alone(marginal, cells):
    model, guide, x, gamma = make(cells)
    q = poutine.trace(guide).get_trace(x, gamma, marginal=marginal)
    mask = torch.rand(x.shape) < 0.7
    full, masked = (
        poutine.trace(poutine.replay(model, trace=q)).get_trace(x, gamma, marginal=marginal, mask=m)
        for m in (True, mask)
    )
    for trace in (full, masked):
        trace.compute_log_prob()
    for site in "zl":
        torch.testing.assert_close(masked.nodes[site]["log_prob"], full.nodes[site]["log_prob"])
    for site in "x" if marginal else "wyhx":
        torch.testing.assert_close(masked.nodes[site]["log_prob_sum"], (full.nodes[site]["log_prob"] * mask).sum())


def test_masked_entries_cannot_change_the_density(cells):
    model, _, x, gamma = make(cells)
    sites = {"z": torch.zeros(60, 1, 3).double(), "l": torch.full((60, 1), 50.0).double()}
    mask = torch.rand(x.shape) < 0.7
    scored = poutine.condition(model, data=sites)
    totals = [
        poutine.trace(scored).get_trace(counts, gamma, mask=mask).log_prob_sum()
        for counts in (x, torch.where(mask, x, 99.0))
    ]
    torch.testing.assert_close(*totals)


def test_minibatch_terms_are_scaled_to_all_cells(batched_cells):
    model, guide, x, gamma = make(batched_cells)
    q = poutine.trace(guide).get_trace(x, gamma)
    sites = {name: q.nodes[name]["value"] for name in ("z", "l")}

    def log_density(rows, **kwargs):
        data = {name: value[rows] for name, value in sites.items()}
        return (
            poutine.trace(poutine.condition(model, data=data)).get_trace(x[rows], gamma[rows], **kwargs).log_prob_sum()
        )

    parts = torch.randperm(60).split(15)
    scaled = [log_density(rows, index=rows, n_cells=60) for rows in parts]
    torch.testing.assert_close(torch.stack(scaled).mean(), log_density(torch.arange(60)))
    torch.testing.assert_close(scaled[0], 4 * log_density(parts[0]))


def test_minibatch_scales_the_guide_alike(cells):
    model, guide, x, gamma = make(cells)
    for part in (model, guide):
        trace = poutine.trace(part).get_trace(x[:15], gamma[:15], index=torch.arange(15), n_cells=60)
        assert {trace.nodes[s]["scale"] for s in ("z", "l")} == {4.0}


# --- global latents ---


def test_weights_with_a_prior_are_sampled_once_and_left_no_parameters():
    prior = ps.weights.NormalWeights(0.5)
    model = ps.SCVI(7, 3, n_hidden=8, weight_priors={"decoder.heads.log_mean.weight": prior})
    assert "decoder.heads.log_mean.weight" not in dict(model.named_parameters())
    guide = ps.guides.DiagonalNormal(model, n_hidden=8)
    x = torch.ones(5, 7)
    q = poutine.trace(guide).get_trace(x)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(x)
    site = p.nodes["decoder.heads.log_mean.weight"]
    assert site["value"].shape == (7, 8)
    assert site["value"] is q.nodes["decoder.heads.log_mean.weight"]["value"]
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), dist.Normal(0.0, 0.5).log_prob(site["value"]).sum())


def test_conditioned_weights_are_those_the_decoder_computes_with():
    weight = torch.randn(7, 8)
    plain = ps.SCVI(7, 3, n_hidden=8).eval()
    name = "decoder.heads.gate_logits.weight"
    random = ps.SCVI(7, 3, n_hidden=8, weight_priors={name: ps.weights.NormalWeights()}).eval()
    plain.decoder.heads["gate_logits"].weight.data.copy_(weight)
    sites = {"z": torch.randn(5, 1, 3), "l": torch.full((5, 1), 9.0)}
    x = torch.ones(5, 7)
    terms = []
    for model, data in ((plain, sites), (random, {**sites, name: weight})):
        trace = poutine.trace(poutine.condition(model, data=data)).get_trace(x)
        trace.compute_log_prob()
        terms.append(trace.nodes["x"]["log_prob"])
    torch.testing.assert_close(*terms)


# --- errors ---


def test_prior_of_the_wrong_event_shape():
    with pytest.raises(ModelError, match=r"event shape \(3,\), got \(2,\); make it for 3 latents"):
        ps.SCVI(7, 3, prior=ps.priors.StandardNormal(2))
    with pytest.raises(ModelError, match=r"is to_event\(1\) missing"):
        ps.SCVI(7, 3, prior=lambda: dist.Normal(torch.zeros(3), 1.0))


def test_a_distribution_is_not_yet_a_prior():
    with pytest.raises(ModelError, match=r"got the distribution Normal itself; pass lambda: Normal\(\.\.\.\)"):
        ps.SCVI(7, 3, prior=dist.Normal(torch.zeros(3), 1.0))


def test_an_unknown_argument_is_answered_with_the_known_ones():
    with pytest.raises(TypeError, match=r"^SCVI\(\) got an unexpected .* 'gene_likelihood'; its .* prior, likelihood,"):
        ps.SCVI(7, 3, gene_likelihood="nb")


def test_weight_prior_that_names_no_parameter():
    with pytest.raises(
        ModelError,
        match="no parameter that may have a prior is called 'decoder.nothing'; the model has .*log_mean.weight",
    ):
        ps.SCVI(7, 3, weight_priors={"decoder.nothing": ps.weights.NormalWeights()})


def test_covariates_and_counts_must_have_the_model_s_widths():
    model = ps.SCVI(7, 3, 2, n_hidden=8)
    x = torch.ones(5, 7)
    with pytest.raises(ModelError, match=r"needs gamma of shape \(cells, 2\)"):
        model(x)
    with pytest.raises(ModelError, match="2 columns, got 3"):
        model(x, torch.zeros(5, 3))
    with pytest.raises(ModelError, match="must have 7 genes, got 6"):
        model(torch.ones(5, 6), torch.zeros(5, 2))
    with pytest.raises(ModelError, match="needs gamma"):
        ps.SCVI(7, 3)(None)


def test_as_many_rows_of_covariates_as_cells():
    with pytest.raises(ModelError, match="rows|cells"):
        ps.SCVI(7, 3, 2)(torch.ones(5, 7), torch.zeros(1, 2))


def test_wrong_genes_without_covariates():
    with pytest.raises(ModelError, match="must have 7 genes, got 6"):
        ps.SCVI(7, 3)(torch.ones(5, 6))


def test_covariates_may_be_left_out_where_there_are_none():
    model = ps.SCVI(7, 3, n_hidden=8)
    x = torch.ones(5, 7)
    assert torch.equal(model(x), x)


def test_guides_need_counts():
    guide = ps.guides.DiagonalNormal(ps.SCVI(7, 3, n_hidden=8), n_hidden=8)
    with pytest.raises(ModelError, match="a distribution given x"):
        guide(None, torch.zeros(5, 0))


def test_a_likelihood_that_knows_only_its_marginal_has_no_explicit_program():
    class Geometric(ps.likelihoods.Likelihood):
        heads = ("log_mean",)

        def marginal(self, log_mean):
            return dist.Geometric(logits=-log_mean)

    model = ps.SCVI(6, 2, likelihood=Geometric(), n_hidden=8).eval()
    assert model(None, torch.zeros(4, 0)).shape == (4, 6)
    with pytest.raises(ModelError, match="explicit = True"):
        model(None, torch.zeros(4, 0), marginal=False)


def test_a_part_may_call_itself_as_it_likes():
    class Odd(Prior):
        def __init__(this, n):  # noqa: N805
            super().__init__(n)

    assert repr(Odd(4)) == "Odd(n=4)"


def test_a_prior_that_draws_while_it_is_looked_at_leaves_global_randomness_alone():
    before = torch.get_rng_state()
    model = ps.SCVI(12, 3, prior=lambda: dist.Normal(torch.randn(3), 1.0).to_event(1))
    with pytest.raises(ModelError, match="'z' differs between two runs"):
        ps.guides.DiagonalNormal(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_repr_of_a_model_holds_its_defaults():
    shown = repr(ps.SCVI(20, dropout=0.1))
    assert "n_latent=10, " in shown
    assert "n_hidden=128, n_layers=2, dropout=0.1" in shown
    assert shown.endswith("seed=0)")
