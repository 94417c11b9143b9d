"""Decoders as parts: the default as it was, linear ones against quadrature, and refusals."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from tests.support.toys import N_GENES, cells_of, fit_of, grid_of, on_line

POISSON = {"likelihood": ps.likelihoods.Poisson(), "library": ps.libraries.NoLibrary()}
LINEAR = {"decoder": ps.networks.LinearDecoder(), **POISSON}
WEIGHT = "decoder.heads.log_mean.weight"


def test_the_default_is_the_multilayer_perceptron():
    part = ps.networks.MLPDecoder(8, dropout=0.1)
    models = [ps.SCVI(N_GENES, 2, n_hidden=8, dropout=0.1), ps.SCVI(N_GENES, 2, decoder=part)]
    for one, other in zip(*(model.state_dict().items() for model in models), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
    assert "decoder" not in repr(models[0])


def test_evidence_and_moments_are_those_of_quadrature():
    cells = cells_of()
    fit = fit_of(ps.SCVI(N_GENES, 1, **LINEAR).double())
    grid = grid_of(fit.model, cells, {"z": on_line(stats.norm(), -8, 8, 801)}, lambda at: 0 * at["z"])
    table = ps.evidence(fit, cells, samples=2000, steps=50, progress=False)
    assert ((table.log_evidence - grid.log_evidence).abs() < 5 * table.se + 1e-4).all()
    z = ps.sample_posterior(fit, cells, samples=2000, sampler=ps.Importance(steps=50), progress=False).z[..., 0]
    mean, sd = grid.moments("z")
    assert np.abs(z.mean("sample") - mean).max() < 5 * sd.max() / 2000**0.5
    assert np.abs(z.std("sample") - sd).max() < 0.05


def test_heads_are_linear_and_gamma_is_apart(batched_cells):
    model = ps.SCVI(20, 2, batched_cells.n_covariates, decoder=ps.networks.LinearDecoder(initial_sd=0.1)).double()
    z, gamma = torch.randn(3, 5, 2).double(), batched_cells[:5][1].double()
    with torch.no_grad():
        for head in model.decoder.heads.values():
            head.covariates.normal_()
        eta = model.decoder(z, gamma)
        for name, head in model.decoder.heads.items():
            expected = z.numpy() @ head.weight.numpy().T + gamma.numpy() @ head.covariates.numpy().T + head.bias.numpy()
            np.testing.assert_allclose(eta[name].numpy(), expected)
    assert list(eta) == list(model.likelihood.heads)


def test_loadings_are_those_of_the_parameter_or_of_its_posterior(tmp_path):
    plain = ps.fit(ps.SCVI(N_GENES, 2, decoder=ps.networks.LinearDecoder()), cells_of(40), epochs=3, progress=False)
    table = ps.loadings(plain)
    weight = plain.model.decoder.heads["log_mean"].weight.detach().numpy()
    np.testing.assert_array_equal(table["loading"], weight)
    assert table["sd"].isna().all(axis=None)
    assert table.index.tolist() == list(plain.schema.gene_names)
    plain.save(tmp_path / "fit")
    pd.testing.assert_frame_equal(ps.loadings(ps.load(tmp_path / "fit")), table)
    sparse = ps.SCVI(N_GENES, 2, weight_priors={WEIGHT: ps.weights.HorseshoeWeights()}, **LINEAR)
    fit = ps.fit(sparse, cells_of(40), epochs=3, progress=False)
    table = ps.loadings(fit, samples=400)
    draws = fit.guide.weights.draws(4000)
    exact = draws[f"{WEIGHT}.global"][:, None, None] * draws[f"{WEIGHT}.local"] * draws[f"{WEIGHT}.raw"]
    assert np.abs(table["loading"] - exact.mean(0).detach().numpy()).max(axis=None) < 0.05
    assert (table["sd"] > 0).all(axis=None)


def test_loadings_of_other_decoders_are_refused():
    with pytest.raises(ModelError, match="Decoder has no loadings.*LinearDecoder"):
        ps.loadings(fit_of(ps.SCVI(N_GENES, 1, **POISSON).double()))
    with pytest.raises(ModelError, match="no head 'gate_logits'; its heads are"):
        ps.loadings(fit_of(ps.SCVI(N_GENES, 1, **LINEAR).double()), head="gate_logits")


class Rectified(torch.nn.Module):
    """A decoder of one's own."""

    def __init__(self, n_latent, n_genes, heads, n_covariates):
        super().__init__()
        self.maps = torch.nn.ModuleDict({name: torch.nn.Linear(n_latent, n_genes) for name in heads})

    def forward(self, z, gamma):
        return {name: linear(z.relu()) for name, linear in self.maps.items()}


class FromTheLeft(Rectified):
    def forward(self, z, gamma):
        return {name: eta - z[:1].sum() for name, eta in super().forward(z, gamma).items()}


def test_a_decoder_of_ones_own_is_a_part():
    model = ps.SCVI(N_GENES, 2, decoder=Rectified)
    fit = ps.fit(model, cells_of(40), epochs=30, progress=False)
    assert fit.history.train_loss.iloc[-1] < fit.history.train_loss.iloc[0]
    assert ps.impute(fit, cells_of(3), samples=3).shape == (3, N_GENES)


def refused(match, **options):
    with pytest.raises(ModelError, match=match):
        ps.guides.DiagonalNormal(ps.SCVI(N_GENES, 2, **options))


def test_what_is_no_decoder_is_refused():
    refused(r"decoder must be what makes a network.*got the class", decoder=ps.networks.LinearDecoder)
    refused("decoder must be what makes a network", decoder=torch.nn.Linear(2, 4))
    refused(r"\['n_hidden', 'norm'\] are for the default decoder", n_hidden=8, norm=None, **LINEAR)
    refused("must make a torch.nn.Module", decoder=lambda *sizes: None)
    refused(r"dict of \['log_mean', .*each \(..., cells, 4\)", decoder=lambda *sizes: Rectified(2, 3, *sizes[2:]))
    refused("stack of draws", decoder=FromTheLeft)
