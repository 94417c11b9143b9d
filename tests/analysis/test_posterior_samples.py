"""sample_posterior: names and dimensions, what is certain given x, moments at given latents, summaries on the way."""

import numpy as np
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.analysis.posterior_samples import decoded, draw_sites
from pyro_scvi.errors import ModelError, SchemaError
from pyro_scvi.inference.samplers import Draws
from tests.support.simulate import simulated_counts

SITES = ["z", "l", "w", "y", "h"]


def fitted(cells, n_latent=3, **options):
    model = ps.SCVI(cells.n_genes, n_latent, cells.n_covariates, n_hidden=8, n_layers=1, **options)
    guide = ps.guides.DiagonalNormal(model, n_hidden=8, n_layers=1)
    return ps.fit(model, cells, guide, epochs=4, validation=0, device="cpu", progress=False)


@pytest.fixture(scope="module")
def named_cells():
    genes = [f"g{i}" for i in range(12)]
    return ps.Cells.from_counts(simulated_counts(17, 12), gene_names=genes, cell_names=[f"c{i}" for i in range(17)])


@pytest.fixture(scope="module")
def fit(named_cells):
    torch.set_num_threads(1)  # this runs before the fixture of every test
    return fitted(named_cells)


def test_dimensions_and_coordinates_are_named(fit, named_cells):
    found = ps.sample_posterior(fit, named_cells, samples=6, sites=SITES)
    assert found.z.dims == ("sample", "cell", "latent")
    assert found.l.dims == ("sample", "cell")
    for site in "wyh":
        assert found[site].dims == ("sample", "cell", "gene")
    assert found.khat.dims == found.ess.dims == ("cell",)
    assert found.sizes == {"sample": 6, "cell": 17, "latent": 3, "gene": 12}
    assert list(found.cell.values) == list(named_cells.cell_names)
    assert list(found.gene.values) == list(named_cells.gene_names)
    assert list(found.latent.values) == [0, 1, 2]
    assert found.z.dtype == np.float32


def test_diagnostics_are_left_out_if_not_asked_for(fit, named_cells):
    with_them, without = (
        ps.sample_posterior(fit, named_cells, samples=5, diagnostics=asked) for asked in (True, False)
    )
    assert set(without.data_vars) == {"z"}
    assert without.z.identical(with_them.z)


def test_only_the_sites_asked_for_are_there(fit, named_cells):
    found = ps.sample_posterior(fit, named_cells, samples=3)
    assert set(found.data_vars) == {"z", "khat", "ess"}
    assert "gene" not in found.dims
    found = ps.sample_posterior(fit, named_cells, samples=3, sites=["h"])
    assert set(found.data_vars) == {"h", "khat", "ess"}
    assert "latent" not in found.dims


def test_what_the_count_settles_is_certain(fit, named_cells):
    found = ps.sample_posterior(fit, named_cells, samples=60, sites=SITES)
    x = named_cells.counts
    counted = np.broadcast_to(x > 0, found.y.shape)
    assert (found.y.values[counted] == np.broadcast_to(x, found.y.shape)[counted]).all()
    assert (found.h.values[counted] == 0).all()
    zero = ~counted
    assert set(np.unique(found.h.values)) == {0.0, 1.0}
    assert (found.y.values[zero & (found.h.values == 0)] == 0).all()
    assert (found.y.values[zero & (found.h.values == 1)] > 0).any()
    assert (found.w > 0).all()
    assert (found.l > 0).all()


@pytest.mark.parametrize("likelihood", ["ZINB", "NB", "ZIP", "Poisson"])
def test_moments_of_the_draws_are_those_given_their_own_latents(likelihood, named_cells):
    """At one z for all draws the means of w, y and h are the closed forms, entry by entry; w scatters as it should."""
    fit = fitted(named_cells, likelihood=getattr(ps.likelihoods, likelihood)(), library=ps.libraries.NoLibrary())
    n = 3000
    x, gamma = named_cells[:6]
    torch.manual_seed(1)
    with torch.no_grad():
        z = torch.randn(1, 6, 1, 3)
        found = Draws({"z": z.expand(n, -1, -1, -1)}, dict)
        values = draw_sites(fit, x, gamma, found, SITES)
        one = {name: value[0].double() for name, value in decoded(fit, x, gamma, found).items()}
    x = x.double()
    logits = fit.model.likelihood.technical_zero_logits(**one)
    rho = torch.zeros_like(x) if logits is None else torch.sigmoid(logits) * (x == 0)
    mu = one["log_mean"].exp()
    expected = {"h": rho, "y": x + rho * mu, "w": fit.model.likelihood.expected_rate(x, one)}
    for site, mean in expected.items():
        draws = values[site].double()
        error = (draws.mean(0) - mean) / (draws.std(0) / n**0.5 + 1e-4 * mean.clamp(min=1e-3))
        assert error.abs().max() < 5.5, site  # 72 entries, some of them skewed
        assert error.square().mean() < 2, site
    if "log_inverse_dispersion" in one:
        r = one["log_inverse_dispersion"].exp()
        a, b = torch.where(x > 0, r + x, r), r / mu  # of w: h = 0 (shape a, rate b + 1), h = 1 (shape r, rate b)
        second = (1 - rho) * a * (a + 1) / (b + 1) ** 2 + rho * r * (r + 1) / b**2
        square = values["w"].double().square()
        assert ((square.mean(0) - second).abs() < 6 * square.std(0) / n**0.5 + 1e-3 * second).all()
    else:
        torch.testing.assert_close(values["w"], mu.float().expand(n, -1, -1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("likelihood", ["NB", "Poisson"])
def test_without_a_gate_no_zero_is_technical(likelihood, named_cells):
    fit = fitted(named_cells, likelihood=getattr(ps.likelihoods, likelihood)())
    found = ps.sample_posterior(fit, named_cells, samples=4, sites=["y", "h"])
    assert (found.h == 0).all()
    assert (found.y == named_cells.counts).all()


def test_poisson_rates_are_the_means(named_cells):
    fit = fitted(named_cells, likelihood=ps.likelihoods.Poisson())
    found = ps.sample_posterior(fit, named_cells, samples=4, sites=["z", "l", "w"])
    _x, gamma = named_cells[:]
    z, l = (torch.as_tensor(found[site].values) for site in "zl")  # noqa: E741
    with torch.no_grad():
        mean = fit.model.decode(z[:, :, None], l[..., None].log(), gamma)["log_mean"].exp()
    np.testing.assert_allclose(found.w, mean, rtol=1e-4)


# --- summaries ---


def summary(drawn):
    return {
        "w_mean": drawn["w"].mean(0),
        "z_sd": drawn["z"].std(0),
        "total": drawn["w"].sum(-1).mean(0),
        "bounds": torch.quantile(drawn["y"], torch.tensor([0.1, 0.9]), 0).permute(1, 2, 0),
        "z_covariance": torch.einsum("sci,scj->cij", drawn["z"], drawn["z"]),
    }


def test_summaries_equal_those_of_all_draws(fit, named_cells):
    options = {"samples": 20, "sites": ["z", "w", "y"], "batch_size": 5}
    draws = ps.sample_posterior(fit, named_cells, **options)
    found = ps.sample_posterior(fit, named_cells, reduce=summary, **options)
    expected = summary({site: torch.as_tensor(draws[site].values) for site in ("z", "w", "y")})
    assert set(found.data_vars) == {*expected, "khat", "ess"}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)
    assert found.w_mean.dims == ("cell", "gene")
    assert found.z_sd.dims == ("cell", "latent")
    assert found.total.dims == ("cell",)
    assert found.bounds.dims == ("cell", "gene", "bounds_dim_1")
    assert found.z_covariance.dims == ("cell", "latent", "z_covariance_dim_1")
    assert list(found.gene.values) == list(named_cells.gene_names)
    assert "sample" not in found.dims


def test_summaries_may_have_the_name_of_a_site(fit, named_cells):
    found = ps.sample_posterior(
        fit,
        named_cells,
        samples=5,
        sites=["z", "w"],
        reduce=lambda drawn: {"w": drawn["w"].sum(-1).mean(0), "z": drawn["z"].mean(0), "h": drawn["w"][:2, :, 0].T},
    )
    assert found.w.dims == ("cell",)
    assert found.z.dims == ("cell", "latent")
    assert found.h.dims == ("cell", "h_dim_0")


def test_summaries_never_see_more_than_a_batch(fit, named_cells):
    seen = []

    def note(drawn):
        seen.append(tuple(drawn["w"].shape))
        return {"w_mean": drawn["w"].mean(0)}

    ps.sample_posterior(fit, named_cells, samples=3, sites=["w"], reduce=note, batch_size=7)
    assert seen == [(3, 7, 12), (3, 7, 12), (3, 3, 12)]


def test_as_many_genes_as_latents():
    cells = ps.Cells.from_counts(simulated_counts(9, 4))
    fit = fitted(cells, n_latent=4)
    found = ps.sample_posterior(fit, cells, samples=3, sites=SITES)
    assert found.z.dims == ("sample", "cell", "latent")
    assert found.w.dims == ("sample", "cell", "gene")
    found = ps.sample_posterior(
        fit, cells, samples=3, sites=["z", "w"], reduce=lambda drawn: {name: v.mean(0) for name, v in drawn.items()}
    )
    assert found.z.dims == ("cell", "latent")
    assert found.w.dims == ("cell", "gene")


# --- batches and errors ---


def test_batches_of_cells_follow_each_other(fit, named_cells):
    """Each batch is in its place: draws of z scatter around the encoder's means whatever the size of the batches."""
    means = ps.embed(fit, named_cells)
    for batch_size in (1, 5, 64):
        found = ps.sample_posterior(fit, named_cells, samples=400, batch_size=batch_size)
        error = (found.z.mean("sample") - means) / (found.z.std("sample") / 20)
        assert float(abs(error).max()) < 4.5
        assert found.sizes["cell"] == 17
    assert np.ptp(means, 0).min() > 0.1  # so that cells out of order would be noticed


def test_other_cells_of_the_schema_may_be_sampled(batched_cells):
    fit = fitted(batched_cells)
    some = batched_cells.take([3, 1, 40])
    found = ps.sample_posterior(fit, some, samples=300, sites=["z", "w"])
    assert list(found.cell.values) == list(batched_cells.cell_names[[3, 1, 40]])
    error = (found.z.mean("sample") - ps.embed(fit, batched_cells)[[3, 1, 40]]) / (found.z.std("sample") / 300**0.5)
    assert float(abs(error).max()) < 4.5


def test_unknown_sites_are_refused_with_the_list_of_sites(fit, named_cells):
    with pytest.raises(ModelError, match=r"no site \['mu'\]; its sites are \('z', 'l', 'w', 'y', 'h'\)"):
        ps.sample_posterior(fit, named_cells, sites=["z", "mu"])
    without = fitted(named_cells, library=ps.libraries.NoLibrary())
    with pytest.raises(ModelError, match=r"no site \['l'\]; its sites are \('z', 'w', 'y', 'h'\)"):
        ps.sample_posterior(without, named_cells, sites=["l"])


def test_cells_of_another_schema_are_refused(fit, named_cells):
    with pytest.raises(SchemaError, match=r"schema=fit\.schema"):
        ps.sample_posterior(fit, ps.Cells.from_counts(named_cells.counts[:, ::-1]))


@pytest.mark.parametrize(
    "sampler",
    [ps.Amortized(), ps.Refined(steps=10), ps.Importance(steps=10, proposals=100), ps.HMC(2, 5, 5, 1, 2, 4)],
    ids=["amortized", "refined", "importance", "hmc"],
)
def test_neighbours_order_and_batches_change_no_draw(cells, sampler):
    fit = ps.fit(ps.SCVI(cells.n_genes, 2, n_hidden=8), cells, epochs=3, progress=False, dtype=torch.float64)
    options = {"samples": 6, "sites": ("z", "l", "w", "h"), "sampler": sampler, "seed": 4, "progress": False}
    every = ps.sample_posterior(fit, cells.take(range(9)), **options)
    rows = [7, 0, 3]
    some = ps.sample_posterior(fit, cells.take(rows), batch_size=2, **options)
    for name in ("z", "l", "w", "h"):
        np.testing.assert_allclose(some[name], every[name].isel(cell=rows), rtol=1e-5, atol=1e-8)
